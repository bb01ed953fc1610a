"""The server over a real socket, asked by the real openai client; what is right is what the model itself says."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from served import FP32, PLAIN, QUESTION, Running, ask, expected, raw

from nybble.data.examples import Message
from nybble.generation.generate import Sampling, generate
from nybble.runs.open_run import load_run
from nybble.serving.requests import ChatRequest, TextRequest


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
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "send the picture as data:",
        ),
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
