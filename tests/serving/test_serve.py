"""The server over a real socket, asked by the real openai client; what is right is what the model itself says."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn

from nybble.data.examples import Message
from nybble.data.template import ChatTemplate
from nybble.errors import ConfigError, RunError
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.generation.generate import Sampling, generate
from nybble.options.groups import MachineOptions
from nybble.options.use_groups import ServerOptions
from nybble.runs.open_run import OpenRun, load_run
from nybble.serving import engine as engine_module
from nybble.serving.app import Api, make_app
from nybble.serving.engine import Engine, load_models
from nybble.serving.requests import ChatRequest, TextRequest, parse
from nybble.serving.server import allowed_hosts, choose_token

FP32 = MachineOptions(device="cpu", compute_dtype="fp32")
QUESTION = [{"role": "user", "content": "What is 3 plus 3?"}]


class Running:
    """A server in a thread."""

    def __init__(self, runs: list[Path], token: str | None = None, max_queue: int = 32):
        self.engine = Engine(load_models(runs, FP32), max_queue, threads=1)
        api = Api(self.engine, token, max_new_tokens=64, max_request_bytes=20_000)
        settings = uvicorn.Config(
            make_app(api, allowed_hosts(ServerOptions(run=tuple(runs)))), port=0, log_level="error"
        )
        self.server = uvicorn.Server(settings)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def client(self, token: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=token, max_retries=0, timeout=60)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.engine.stop()


@pytest.fixture(scope="module")
def second(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another run on the same base, of another rank."""
    from nybble.options.verbs import TrainConfig, load_config
    from nybble.training.session import train

    out = tmp_path_factory.mktemp("second") / "other"
    config = load_config(trained / "config.yaml", {"out": str(out), "rank": 2, "max_steps": 3})
    assert isinstance(config, TrainConfig)
    train(config)
    return out


@pytest.fixture(scope="module")
def running(trained: Path, second: Path) -> Iterator[Running]:
    server = Running([trained, second])
    yield server
    server.stop()


def expected(run: Path, tuned: bool = True, max_tokens: int = 24) -> str:
    """The greedy answer of a run loaded by itself."""
    from nybble.layers.convert import enable_adapters

    loaded = load_run(run, FP32)
    enable_adapters(loaded.model, tuned)
    prompt = loaded.template.encode_prompt([Message("user", QUESTION[0]["content"])])
    ids = generate(loaded.model, [prompt], stop_ids=loaded.template.stop_ids, max_new_tokens=max_tokens)[0]
    return loaded.template.tokenizer.decode(ids, skip_special_tokens=True)


def ask(client: openai.OpenAI, model: str, **options: Any) -> Any:
    return client.chat.completions.create(model=model, messages=QUESTION, **({"max_tokens": 24} | options))


def test_each_model_answers_as_it_does_alone(running: Running, trained: Path, second: Path) -> None:
    client = running.client()
    names = [model.id for model in client.models.list()]
    assert names[:2] == ["run", "other"] and names[2].endswith("(base)")
    answers = [ask(client, name).choices[0].message.content for name in (*names, *names)]  # none disturbs another
    assert answers == [expected(trained), expected(second), expected(trained, tuned=False)] * 2
    assert answers[0] != answers[2]


def test_frozen_tensors_are_shared(running: Running) -> None:
    first, other, base = running.engine.models.values()
    frozen = {parameter.data_ptr() for parameter in base.model.parameters()}
    for tuned in (first, other):
        own = [p for name, p in tuned.model.named_parameters() if "lora_" not in name]
        assert {parameter.data_ptr() for parameter in own} == frozen
    assert not any("lora_" in name for name, _ in base.model.named_parameters())


def test_usage_and_reasons(running: Running) -> None:
    whole = ask(running.client(), "run", max_tokens=64)
    assert whole.choices[0].finish_reason == "stop"  # it learnt to end its turn
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    cut = ask(running.client(), "run", max_completion_tokens=2)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 2


def test_streams_are_the_whole_answer(running: Running, trained: Path) -> None:
    chunks = list(ask(running.client(), "run", stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected(trained)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens > 0


def test_text_completions(running: Running, trained: Path) -> None:
    client = running.client()
    template = running.engine.models["run"].template
    prompt = template.render([Message("user", QUESTION[0]["content"])], True)
    for given in (prompt, [prompt], template.encoder.encode(prompt)):
        answer = client.completions.create(model="run", prompt=given, max_tokens=24)
        assert answer.choices[0].text == expected(trained)
    chunks = client.completions.create(model="run", prompt=prompt, max_tokens=24, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected(trained)


def test_stop_strings_end_an_answer_wherever_tokens_do(running: Running, trained: Path) -> None:
    text = expected(trained)
    stop = text[4:7]
    assert len(stop) == 3
    for stream in (False, True):
        answer = ask(running.client(), "run", stop=["never said", stop], stream=stream)
        if stream:
            found = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        else:
            found = answer.choices[0].message.content
            assert answer.choices[0].finish_reason == "stop"
        assert found == text[: text.index(stop)]
    assert ask(running.client(), "run", stop="never said").choices[0].message.content == text


def test_sampling_follows_its_seed(running: Running) -> None:
    drawn = [ask(running.client(), "other", temperature=1.5, seed=n).choices[0].message.content for n in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "absent"}, "no model 'absent'"),
        ({"temperature": 9}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 2}, "n is not supported"),
        ({"logprobs": True}, "logprobs is not supported"),
        ({"stop": [""]}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, "context"),
        ({"messages": [{"role": "user", "content": None}]}, "content is missing"),
        ({"extra_body": {"min_p": 1}}, "min_p"),
        ({"extra_body": {"top_k": -2}}, "top_k"),
        ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty"),
        ({"extra_body": {"repetition_penalty": 1e-300, "temperature": 1}}, "repetition_penalty"),
        ({"temperature": 1e-300}, "temperature"),
        ({"temperature": True}, "temperature: true is no number"),
        ({"max_tokens": True}, "max_tokens: true is no number"),
        ({"seed": False}, "seed: false is no number"),
        ({"stop": [1]}, "stop"),
        ({"stop": [None]}, "stop"),
        ({"extra_body": {"stop_token_ids": [True]}}, "stop_token_ids.0: true is no number"),
        ({"extra_body": {"stop_token_ids": [10**30]}}, "stop_token_ids holds a token id outside"),
        ({"extra_body": {"stop_token_ids": [-1]}}, "stop_token_ids holds a token id outside"),
    ],
)
def test_what_is_refused(running: Running, options: dict[str, Any], words: str) -> None:
    request = {"model": "run", "messages": QUESTION} | options
    with pytest.raises(openai.APIStatusError) as refused:
        running.client().chat.completions.create(**request)
    assert refused.value.status_code == (404 if "absent" in words else 400)
    assert words in refused.value.message
    for stream in (True,):  # before a stream begins, and as an error rather than an event
        with pytest.raises(openai.APIStatusError):
            running.client().chat.completions.create(**request, stream=stream)


PLAIN = {"model": "run", "messages": QUESTION, "max_tokens": 24}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("sent", "name"),
    [
        ({"guided_choice": ["yes", "no"]}, "guided_choice"),
        ({"guided_json": {}}, "guided_json"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"n": True}, "n"),
        ({"presence_penalty": False}, "presence_penalty"),
        ({"echo": 0}, "echo"),
        ({"logprobs": 0}, "logprobs"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"logit_bias": {"3": 5}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
        ({"no_such_key": 1}, "no_such_key"),
        ({"stream_options": {"no_such_key": 1}}, "stream_options: no_such_key"),
        ({"messages": [QUESTION[0] | {"refusal": "no"}]}, "messages.0: refusal"),
        ({"messages": [QUESTION[0] | {"weight": 0}]}, "messages.0: weight"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "lang": "en"}]}]}, "lang"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(running: Running, sent: dict[str, Any], name: str) -> None:
    status, answer = raw(running, json.dumps(PLAIN | sent).encode())
    assert status == 400 and answer["error"]["code"] == "unsupported_parameter"
    assert f"{name} is not supported here" in answer["error"]["message"]
    assert "Honoured: " in answer["error"]["message"]


def test_every_honoured_key_changes_an_answer_or_how_it_is_given() -> None:
    """A key that joins the honoured ones joins these tests."""
    tested = {"model", "messages", "max_tokens", "max_completion_tokens", "max_new_tokens", "stream", "stream_options"}
    tested |= {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "stop_token_ids"}
    chat = {"messages", "tools", "tool_choice", "add_generation_prompt", "continue_final_message"}  # below
    assert set(ChatRequest.model_fields) == tested | chat
    assert set(TextRequest.model_fields) == tested - {"messages"} | {"prompt"}


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
WITH_TOOLS = (
    "{% if tools %}{{ 'tools: ' + (tools | tojson) + '\n' }}{% endif %}{% for m in messages %}{{ m['role'] + ':' }}"
    "{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}{{ '<' + c['function']['name'] + '>' }}{% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def test_tools_calls_and_results_are_given_to_the_template(running: Running, trained: Path) -> None:
    template = ChatTemplate(load_run(trained, FP32).template.tokenizer, chat_template=WITH_TOOLS)
    end = template.tokenizer.eos_token
    turns = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    turns += [{"role": "tool", "tool_call_id": "c", "content": "5"}]

    def prompt(**sent: Any) -> str:
        asked = parse(json.dumps(PLAIN | {"messages": turns} | sent).encode(), ChatRequest)
        return template.tokenizer.decode(template.encode_prompt(asked.conversation(), asked.schemas()))

    assert prompt().endswith(f"{end}assistant:<f>{end}tool:5{end}assistant:")
    assert prompt(tools=[TOOL]).startswith("tools: ") and json.dumps(TOOL["function"]) in prompt(
        tools=[TOOL["function"]]
    )
    assert prompt(tools=[TOOL], tool_choice="none") == prompt()
    for wrong, words in (
        ({"messages": [QUESTION[0], {"role": "tool", "content": "5"}]}, "turn 2 is the result of a call"),
        ({"messages": [*QUESTION, {"role": "assistant", "tool_calls": [{"function": {}}]}]}, "without a name"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL]}, "no place for"),  # this run's own template has none
    ):
        status, answer = raw(running, json.dumps(PLAIN | wrong).encode())
        assert status == 400 and words in answer["error"]["message"], answer


HERMES = (
    "{% if tools %}{{ (tools | tojson) + '\n' }}{% endif %}{% for m in messages %}{{ m['role'] + ':' }}"
    "{% if m['reasoning_content'] %}{{ '<think>' + m['reasoning_content'] + '</think>' }}{% endif %}"
    "{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}"
    "{{ '<tool_call>' + (c['function'] | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
SUM = '<tool_call>{"name": "add", "arguments": {"a": 3}}</tool_call>'
OTHER = SUM.replace("3", "4")


@pytest.fixture
def saying(running: Running, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets the model of a template with thoughts and calls say a text; asked as a whole and as a stream."""
    served = running.engine.models["run"]
    template = ChatTemplate(served.template.tokenizer, chat_template=HERMES)
    monkeypatch.setitem(running.engine.models, "run", replace(served, template=template))
    client = running.client()

    def say(text: str, max_tokens: int | None = None, **options: Any) -> tuple[Any, dict[str, Any]]:
        ids = template.encoder.encode(text)[:max_tokens]

        def generate(model: Any, prompts: Any, *, on_token: Any, **_: Any) -> None:
            for token in ids:
                on_token(0, token)

        monkeypatch.setattr(engine_module, "generate", generate)
        options = {"tools": [ADD], "max_tokens": max_tokens} | options
        whole = ask(client, "run", **options)
        told: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": [], "finish": None}
        for chunk in ask(client, "run", stream=True, **options):
            (choice,) = chunk.choices
            told["content"] += choice.delta.content or ""
            told["reasoning_content"] += getattr(choice.delta, "reasoning_content", None) or ""
            told["tool_calls"] += choice.delta.tool_calls or []
            told["finish"] = choice.finish_reason or told["finish"]
        message = whole.choices[0].message
        assert told["content"] == (message.content or "") and told["finish"] == whole.choices[0].finish_reason
        assert told["reasoning_content"] == (getattr(message, "reasoning_content", None) or "")
        pairs = [
            [(c.function.name, c.function.arguments) for c in calls or []]
            for calls in (message.tool_calls, told["tool_calls"])
        ]
        assert pairs[0] == pairs[1]
        return whole, told

    return say


def test_calls_and_thoughts_are_what_the_openai_client_reads(saying: Any) -> None:
    whole, _ = saying(f"<think>\nHm, <b>3.\n</think>\n\nLet me add.\n{SUM}\n{OTHER}")
    choice = whole.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me add."
    assert choice.message.reasoning_content == "Hm, <b>3."
    calls = choice.message.tool_calls
    assert [(c.type, c.function.name, json.loads(c.function.arguments)) for c in calls] == [
        ("function", "add", {"a": 3}),
        ("function", "add", {"a": 4}),
    ]
    assert len({call.id for call in calls}) == 2
    turns = [*QUESTION, choice.message.model_dump(exclude_none=True)]
    turns += [{"role": "tool", "tool_call_id": call.id, "content": "5"} for call in calls]
    asked = parse(json.dumps(PLAIN | {"messages": turns, "tools": [ADD]}).encode(), ChatRequest)
    assert [len(message.calls) for message in asked.conversation()] == [0, 2, 0, 0], "it can be sent back"
    alone, _ = saying(SUM)
    assert alone.choices[0].message.content is None and len(alone.choices[0].message.tool_calls) == 1


@pytest.mark.parametrize(
    ("text", "options", "content", "warned"),
    [
        ("3 < 4, <tool is no call ", {}, "3 < 4, <tool is no call ", False),
        (f"Look: {SUM}", {"tools": []}, f"Look: {SUM}", False),  # without tools there are no calls
        (f"Look: {SUM}", {"tool_choice": "none"}, f"Look: {SUM}", False),
        (f"Look: {SUM[:-20]}", {}, f"Look: {SUM[:-20]}", True),
        (f"Look: {SUM}", {"max_tokens": 30}, None, True),  # cut off within the call
        ("<think>so", {}, "", False),
    ],
)
def test_what_is_no_whole_call_stays_text(saying: Any, text: str, options: Any, content: str, warned: bool) -> None:
    whole, told = saying(text, **options)
    choice = whole.choices[0]
    assert choice.message.tool_calls is None and choice.finish_reason in ("stop", "length")
    assert content is None or choice.message.content == content
    assert ("cannot be read; it stays text" in str(getattr(whole, "warnings", ""))) == warned
    if text == "<think>so":
        assert told["reasoning_content"] == "so"


def test_an_answer_that_has_begun_is_gone_on_with(running: Running, trained: Path) -> None:
    loaded = load_run(trained, FP32)
    turns = [*QUESTION, {"role": "assistant", "content": "It"}]
    prompt = loaded.template.encode_continued([Message("user", QUESTION[0]["content"]), Message("assistant", "It")])
    ids = generate(loaded.model, [prompt], stop_ids=loaded.template.stop_ids, max_new_tokens=24)[0]
    go_on = {"messages": turns, "continue_final_message": True, "add_generation_prompt": False}
    status, answer = raw(running, json.dumps(PLAIN | go_on).encode())
    assert status == 200 and answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["choices"][0]["message"]["content"] == loaded.template.tokenizer.decode(ids, skip_special_tokens=True)
    for wrong in ({"messages": turns, "continue_final_message": True}, go_on | {"messages": QUESTION}):
        status, answer = raw(running, json.dumps(PLAIN | wrong).encode())
        assert status == 400 and "continue_final_message" in answer["error"]["message"]


def test_what_asks_for_nothing_is_answered(running: Running, trained: Path) -> None:
    """Nulls, defaults, and what clients send for the server's book-keeping."""
    expected_text = expected(trained)
    everything = {key for kind in (ChatRequest,) for key in (*kind.model_fields, *kind.neutral, *kind.harmless)}
    nulls = dict.fromkeys(everything - set(PLAIN))
    neutral = {key: values[0] for key, values in ChatRequest.neutral.items()}
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": True, "parallel_tool_calls": True}
    turn = {"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"], "cache_control": {}}]}
    named = {"messages": [turn | {"name": "me", "tool_calls": None, "refusal": None}]}
    for sent in ({}, nulls, neutral, harmless, named, {"no_such_key": None}, {"top_k": -1}):
        status, answer = raw(running, json.dumps(PLAIN | sent).encode())
        assert status == 200, answer
        assert answer["choices"][0]["message"]["content"] == expected_text


def test_an_assistants_turn_may_be_empty(running: Running) -> None:
    answers = []
    for turn in ({"content": ""}, {"content": None}, {}, {"content": None, "refusal": None, "tool_calls": []}):
        messages = [*QUESTION, {"role": "assistant"} | turn, *QUESTION]
        status, answer = raw(running, json.dumps(PLAIN | {"messages": messages}).encode())
        assert status == 200, answer
        answers.append(answer["choices"][0]["message"]["content"])
    assert len(set(answers)) == 1


def test_sampling_options_are_honoured(running: Running, trained: Path) -> None:
    """As the model answers them alone; each changes the answer that it is tried on."""
    loaded = load_run(trained, FP32)
    prompt = loaded.template.encode_prompt([Message("user", QUESTION[0]["content"])])
    hot = {"temperature": 2.0, "seed": 1}
    for changed, beside in (
        ({"top_k": 2}, hot),
        ({"min_p": 0.9}, hot),
        ({"top_p": 0.3}, hot),
        ({"seed": 5}, hot),
        ({"temperature": 0.3}, hot),
        ({"repetition_penalty": 50.0}, {}),
    ):
        found = []
        for options in (beside | changed, beside):
            ids = generate(
                loaded.model,
                [prompt],
                stop_ids=loaded.template.stop_ids,
                max_new_tokens=24,
                sampling=Sampling(**options),  # type: ignore[arg-type]
            )[0]
            status, answer = raw(running, json.dumps(PLAIN | options).encode())
            assert status == 200, answer
            found.append(answer["choices"][0]["message"]["content"])
            assert found[-1] == loaded.template.tokenizer.decode(ids, skip_special_tokens=True)
        assert found[0] != found[1], changed


def test_stop_tokens_end_an_answer(running: Running, trained: Path) -> None:
    loaded = load_run(trained, FP32)
    prompt = loaded.template.encode_prompt([Message("user", QUESTION[0]["content"])])
    ids = generate(loaded.model, [prompt], stop_ids=loaded.template.stop_ids, max_new_tokens=24)[0]
    status, answer = raw(running, json.dumps(PLAIN | {"stop_token_ids": [ids[2]]}).encode())
    assert status == 200 and answer["choices"][0]["finish_reason"] == "stop"
    text = loaded.template.tokenizer.decode(ids[: ids.index(ids[2])], skip_special_tokens=True)
    assert answer["choices"][0]["message"]["content"] == text
    assert answer["usage"]["completion_tokens"] == ids.index(ids[2])


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_new_tokens"])
def test_an_answers_length_has_three_names(running: Running, name: str) -> None:
    body = {key: value for key, value in PLAIN.items() if key != "max_tokens"} | {name: 2}
    status, answer = raw(running, json.dumps(body).encode())
    assert status == 200 and answer["usage"]["completion_tokens"] == 2
    status, answer = raw(running, json.dumps(body | {"max_tokens": 1, "max_new_tokens": 3}).encode())
    assert status == 200 and answer["usage"]["completion_tokens"] == 1


def test_a_limit_above_the_servers_is_taken_down_to_it_and_said(running: Running) -> None:
    client = running.client()
    base = next(model.id for model in client.models.list() if model.id.endswith("(base)"))
    body = {"model": base, "temperature": 2.0, "seed": 3}
    long = client.completions.create(**body, prompt="1", max_tokens=65)
    assert long.warnings == ["65 new tokens were asked for; this answer may have 64."]
    assert long.usage.completion_tokens <= 64
    served = running.engine.models["run"]
    context = served.model.config.max_position_embeddings
    near_full = [served.template.encoder.encode("a")[0]] * (context - 3)
    answer = client.completions.create(**body, prompt=near_full, max_tokens=10)
    assert answer.warnings == ["10 new tokens were asked for; this answer may have 3."]
    assert answer.usage.completion_tokens <= 3
    *_, last = ask(client, "run", stream=True, max_tokens=100)
    assert last.warnings == ["100 new tokens were asked for; this answer may have 64."]
    assert not hasattr(ask(client, "run", max_tokens=64), "warnings")


def test_a_model_by_its_name(running: Running) -> None:
    client = running.client()
    for model in client.models.list():
        assert client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("absent")


def raw(running: Running, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", "/v1/chat/completions", body, sent)
    response = connection.getresponse()
    text = response.read()
    return response.status, json.loads(text) if text.startswith(b"{") else {}


def test_guards(running: Running) -> None:
    body = json.dumps({"model": "run", "messages": QUESTION, "max_tokens": 2}).encode()
    assert raw(running, body)[0] == 200
    assert raw(running, body, Host="evil.example")[0] == 400
    assert raw(running, body, Host="localhost:1234")[0] == 200
    assert raw(running, body, Content_Type="text/plain")[0] == 415
    assert raw(running, b" " * 20_001 + body)[0] == 413
    assert raw(running, b"{")[0] == 400
    assert raw(running, b"[" * 15_000)[0] == 400
    assert raw(running, b'{"model": "run", "messages": [{"role": "user", "content": "\\ud800"}]}')[0] in (200, 400)
    assert raw(running, body)[0] == 200


def test_a_token_keeps_others_out(trained: Path) -> None:
    server = Running([trained], token="secret")
    try:
        for wrong in ("none", "secre", "secret2", "sécret"):
            body = json.dumps({"model": "run", "messages": QUESTION}).encode()
            assert raw(server, body, Authorization=f"Bearer {wrong}".encode().decode("latin-1"))[0] == 401
        with pytest.raises(openai.AuthenticationError):
            list(server.client("wrong").models.list())
        assert ask(server.client("secret"), "run", max_tokens=2).choices
    finally:
        server.stop()


def test_a_full_queue_answers_429(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def wait(*args: Any, on_token: Any, **options: Any) -> None:
        assert go_on.wait(30)
        on_token(0, 70)

    server = Running([trained], max_queue=2)
    monkeypatch.setattr(engine_module, "generate", wait)
    try:
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(ask, server.client(), "run") for _ in range(2)]
            deadline = time.monotonic() + 20
            while server.engine._room._value and time.monotonic() < deadline:  # type: ignore[attr-defined]
                time.sleep(0.01)
            with pytest.raises(openai.RateLimitError):
                ask(server.client(), "run")
            go_on.set()
            assert all(answer.result().choices for answer in waiting)
        assert ask(server.client(), "run").choices
    finally:
        go_on.set()
        server.stop()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_computation(
    trained: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    given = []

    def endless(*args: Any, on_token: Any, **options: Any) -> None:
        for token in range(3000):
            given.append(token)
            on_token(0, 70)
            time.sleep(0.01)

    server = Running([trained])
    monkeypatch.setattr(engine_module, "generate", endless)
    try:
        body = json.dumps({"model": "run", "messages": QUESTION, "stream": stream}).encode()
        connection = socket.create_connection(("127.0.0.1", server.port))
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        while len(given) < 5:
            time.sleep(0.01)
        connection.close()
        monkeypatch.undo()
        assert ask(server.client(), "run").choices[0].message.content
        assert len(given) < 2000
    finally:
        server.stop()


def test_a_stream_that_breaks_off_is_told_without_details_and_logged(
    trained: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks_off(*args: Any, on_token: Any, **options: Any) -> None:
        on_token(0, 40)
        on_token(0, 41)
        raise RuntimeError("secret path /home/me")

    server = Running([trained])
    monkeypatch.setattr(engine_module, "generate", breaks_off)
    try:
        with pytest.raises(openai.APIError) as failure:
            list(ask(server.client(), "run", stream=True))
        assert "secret path" not in failure.value.message and "log says why" in failure.value.message
        assert "secret path" in caplog.text
    finally:
        server.stop()


def test_a_failure_is_told_without_details(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("secret path /home/me")

    server = Running([trained])
    monkeypatch.setattr(engine_module, "generate", broken)
    try:
        with pytest.raises(openai.InternalServerError) as failure:
            ask(server.client(), "run")
        assert "secret path" not in failure.value.message
        monkeypatch.undo()
        assert ask(server.client(), "run").choices
    finally:
        server.stop()


def storm(clients: list[openai.OpenAI], right: dict[str, str], requests: int) -> None:
    """Concurrent clients, one of whom leaves mid-stream each round; every answer must be its model's own."""

    def client_rounds(number: int) -> int:
        client, name = clients[number], list(right)[number % len(right)]
        for round_number in range(requests):
            if round_number % len(clients) == number:
                stream = ask(client, name, stream=True)
                next(iter(stream))
                stream.close()
            elif number % 2:
                assert ask(client, name).choices[0].message.content == right[name]
            else:
                chunks = ask(client, name, stream=True)
                assert "".join(c.choices[0].delta.content or "" for c in chunks) == right[name]
        return requests

    with ThreadPoolExecutor(len(clients)) as pool:
        assert list(pool.map(client_rounds, range(len(clients)))) == [requests] * len(clients)


def test_concurrent_clients(running: Running, trained: Path, second: Path) -> None:
    storm([running.client() for _ in range(4)], {"run": expected(trained), "other": expected(second)}, requests=6)


@pytest.mark.slow
def test_many_concurrent_clients_leave_memory_flat(running: Running, trained: Path, second: Path) -> None:
    from nybble.memory.measure import anonymous_bytes

    right = {"run": expected(trained), "other": expected(second)}
    clients = [running.client() for _ in range(16)]  # made once: each keeps a megabyte of its own in this process
    started, held = time.perf_counter(), [anonymous_bytes()]
    for _ in range(5):
        storm(clients, right, requests=10)
        held.append(anonymous_bytes())
    seconds, grown = time.perf_counter() - started, [f"{(b - a) / 1e6:+.1f}" for a, b in pairwise(held)]
    print(f"800 requests in {seconds:.0f} s; MB more after each 160: {', '.join(grown)}")


# ---- starting ------------------------------------------------------------------------------------


def options(**given: Any) -> ServerOptions:
    return ServerOptions(run=["r"], **given)


def test_open_addresses_need_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NYBBLE_TOKEN", raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        assert choose_token(options(host=host)) is None
    for host in ("0.0.0.0", "192.168.1.4", "example.org", "::"):
        with pytest.raises(ConfigError, match="no token"):
            choose_token(options(host=host))
        assert choose_token(options(host=host, token="t")) == "t"
    monkeypatch.setenv("NYBBLE_TOKEN", "from the environment")
    assert choose_token(options(host="0.0.0.0")) == "from the environment"


def test_names_that_clients_may_use() -> None:
    assert allowed_hosts(options()) == ["localhost", "127.0.0.1", "::1"]
    assert "nas.local" in allowed_hosts(options(host="0.0.0.0", allow_host="nas.local, nas"))
    assert "0.0.0.0" not in allowed_hosts(options(host="0.0.0.0"))


def test_runs_of_other_layer_formats_are_not_served_together(
    trained: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which layers have how many bits is measured on each run's own rows, so the options alone do not say it."""
    formats = {"run": BaseFormats(), second.name: BaseFormats(QuantSpec("nf3"))}
    monkeypatch.setattr(OpenRun, "formats", property(lambda opened: formats[opened.run.path.name]))
    with pytest.raises(RunError, match="other formats of its layers"):
        load_models([trained, second], FP32)


def test_runs_of_other_bases_or_names_are_not_served_together(trained: Path, make_run: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="share their base"):
        load_models([trained, make_run()], FP32)
    with pytest.raises(RunError, match="Two runs are named run"):
        load_models([trained, trained], FP32)
    assert torch.get_num_threads() >= 1
