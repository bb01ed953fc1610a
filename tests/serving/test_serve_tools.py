"""Tools, calls and thoughts, there and back, and answers that go on with what was begun."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from served import CALL, FP32, PLAIN, QUESTION, Running, ask, raw

from nybble.data.examples import Message
from nybble.data.template import ChatTemplate
from nybble.generation.generate import generate
from nybble.runs.open_run import load_run
from nybble.serving import engine as engine_module
from nybble.serving.requests import ChatRequest, parse

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
        return template.tokenizer.decode(template.encode_prompt(asked.conversation(str), asked.schemas()))

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
    assert [len(message.calls) for message in asked.conversation(str)] == [0, 2, 0, 0], "it can be sent back"
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


def test_an_assistants_turn_may_be_empty(running: Running) -> None:
    answers = []
    for turn in ({"content": ""}, {"content": None}, {}, {"content": None, "refusal": None, "tool_calls": []}):
        messages = [*QUESTION, {"role": "assistant"} | turn, *QUESTION]
        status, answer = raw(running, json.dumps(PLAIN | {"messages": messages}).encode())
        assert status == 200, answer
        answers.append(answer["choices"][0]["message"]["content"])
    assert len(set(answers)) == 1
