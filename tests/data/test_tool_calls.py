"""Tools, calls and results: read from every format, given to the template as it wants them, the calls learnt and the
results not. The templates are small ones of our own, each with one behaviour of published ones; tests/data/
test_renderers.py has those themselves."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rendered import learnt_texts, template_of

from nybble.data.examples import CallForm, Example, Message, ToolCall
from nybble.data.field_names import FieldNames, field_names
from nybble.data.prepare import prepare
from nybble.data.readers import read_examples
from nybble.errors import ConfigError, DataError
from nybble.options.groups import RowOptions

SCHEMA = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells it.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
HEAD = "{% if tools %}{{ '<|system|>' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def chatml(call: str, end: str = "'<|im_end|>\n'", words: str = "m['content'] or ''") -> str:
    """ChatML whose calls are written by the Jinja text `call` of a call c."""
    return (
        HEAD + "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ " + words + " }}"
        "{% for c in m['tool_calls'] or [] %}" + call + "{% endfor %}{{ " + end + " }}{% endfor %}" + PROMPT
    )


CALL = "{{ '<tool_call>' + (c['function'] | tojson) + '</tool_call>' }}"
BY_HAND = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
STYLES = {
    # name: (template, how it is given calls, what is learnt of a call, by hand)
    "objects": (chatml(CALL), CallForm(), f"{BY_HAND}<|im_end|>"),
    "text": (
        chatml("{{ '<call>' + c['function']['name'] + '\n' + c['function']['arguments'] + '</call>' }}"),
        CallForm(arguments_as_text=True),
        '<call>weather\n{"city": "Oslo"}</call><|im_end|>',
    ),
    "python": (  # prints what it is given
        chatml("{{ c['function']['name'] }}({{ c['function']['arguments'] }})"),
        CallForm(arguments_as_text=True),
        'weather({"city": "Oslo"})<|im_end|>',
    ),
    "null": (  # calls only where there is no content
        chatml("{% if m['content'] is none %}" + CALL + "{% endif %}"),
        CallForm(null_content=True),
        f"{BY_HAND}<|im_end|>",
    ),
    "short ids": (
        chatml(
            "{% if c['id'] | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}"
            "{{ '[' + c['id'] + ']' }}" + CALL
        ),
        CallForm(short_ids=True),
        None,  # has an id of its own
    ),
    "own end": (  # gpt-oss: a call ends otherwise than an answer
        chatml(CALL, end="'<|end|>\n' if m['tool_calls'] else '<|im_end|>\n'"),
        CallForm(),
        f"{BY_HAND}<|end|>",
    ),
    "marks": (  # Qwen3.5: no JSON
        chatml(
            "{{ '<f=' + c['function']['name'] + '>' }}{% for k, v in c['function']['arguments'] | items %}"
            "{{ '<p=' + k + '>' }}{{ v if v is string else v | tojson }}{% endfor %}"
        ),
        CallForm(),
        "<f=weather><p=city>Oslo<|im_end|>",
    ),
}


def write(tmp_path, *rows, name="a.jsonl") -> str:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def openai(arguments='{"city": "Oslo"}', **changes):
    """A row in OpenAI's form, with a call, its result and an answer."""
    call = {"id": "call_abc", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    turns = [
        {"role": "user", "content": "Weather in Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_abc", "content": '{"sky": "grey"}'},
        {"role": "assistant", "content": "Grey."},
    ]
    return {"messages": turns, "tools": [SCHEMA]} | changes


@pytest.mark.parametrize("arguments", ['{"city": "Oslo"}', {"city": "Oslo"}], ids=["text", "object"])
@pytest.mark.parametrize("style", STYLES)
def test_calls_are_learnt_and_results_are_not(tokenizer_of, tmp_path, style, arguments):
    text, form, by_hand = STYLES[style]
    template = template_of(tokenizer_of, text)
    assert template.shows_calls and template._call_form == form
    [example] = read_examples(write(tmp_path, openai(arguments))).examples
    runs = learnt_texts(template, example)
    if by_hand is None:
        id = example.messages[1].calls[0].id
        by_hand = f"[{form.id(id)}]{BY_HAND}<|im_end|>"
        assert form.id(id) != id and form.id("abcdefgh1") == "abcdefgh1"
    assert runs == [by_hand, "Grey.<|im_end|>"]


def test_the_prompt_is_what_chat_sends_with_the_same_tools_and_results(tokenizer_of, tmp_path):
    template = template_of(tokenizer_of, STYLES["objects"][0])
    [example] = read_examples(write(tmp_path, openai())).examples
    [row] = template.encode_example(example)
    asked = template.encode_prompt(example.messages[:1], example.tools)
    assert row.prompt_ids == asked and "Tells it." in template.tokenizer.decode(asked)
    answered = template.encode_prompt(example.messages[:3], example.tools)
    assert row.input_ids[: len(answered)].tolist() == answered
    plain = template.tokenizer.apply_chat_template(
        [message.as_dict() for message in example.messages], tools=[SCHEMA], return_dict=True
    )
    assert row.input_ids.tolist() == plain["input_ids"]


def test_both_ends_stop_an_answer(tokenizer_of):
    template = template_of(tokenizer_of, STYLES["own end"][0])
    ends = template.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|end|>", "</s>"])
    assert template.stop_ids == tuple(ends)


def test_parallel_calls_and_results_in_another_order(tokenizer_of, tmp_path):
    calls = [{"id": id, "function": {"name": "weather", "arguments": {"city": city}}} for id, city in ("aA", "bB")]
    turns = [
        {"role": "user", "content": "Both?"},
        {"role": "assistant", "content": "Two calls.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "b", "content": 2},
        {"role": "tool", "tool_call_id": "a", "content": [{"sky": "blue"}]},
        {"role": "assistant", "content": "Done."},
    ]
    [example] = read_examples(write(tmp_path, {"messages": turns, "tools": json.dumps([SCHEMA])})).examples
    assert [(turn.answers, turn.name, turn.content) for turn in example.messages[2:4]] == [
        ("b", "weather", "2"),
        ("a", "weather", '[{"sky": "blue"}]'),
    ]
    first, last = learnt_texts(template_of(tokenizer_of, STYLES["objects"][0]), example)
    assert first == "Two calls." + "".join(BY_HAND.replace("Oslo", city) for city in "AB") + "<|im_end|>"
    assert last == "Done.<|im_end|>"


# ---- formats -------------------------------------------------------------------------------------

BARE = {"name": "weather", "description": "Tells it.", "parameters": SCHEMA["function"]["parameters"]}
SYSTEM = "You call functions. <tools> [{}] </tools> Answer with <tool_call> {{..}} </tool_call>."
FORMATS = {
    "OpenAI, older": {
        "messages": [
            {"role": "user", "content": "Weather in Oslo?"},
            {"role": "assistant", "function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
            {"role": "function", "name": "weather", "content": '{"sky": "grey"}'},
            {"role": "assistant", "content": "Grey."},
        ],
        "functions": [BARE],
    },
    "LLaMA-Factory": {
        "conversations": [
            {"from": "human", "value": "Weather in Oslo?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
            {"from": "observation", "value": '{"sky": "grey"}'},
            {"from": "gpt", "value": "Grey."},
        ],
        "tools": json.dumps([BARE]),
    },
    "Hermes": {
        "conversations": [
            {"from": "system", "value": SYSTEM.format(json.dumps(SCHEMA))},
            {"from": "human", "value": "Weather in Oslo?"},
            {"from": "gpt", "value": "<tool_call>\n{'name': 'weather', 'arguments': {'city': 'Oslo'}}\n</tool_call>"},
            {"from": "tool", "value": '<tool_response>\n{"sky": "grey"}\n</tool_response>'},
            {"from": "gpt", "value": "Grey."},
        ],
    },
    "Glaive": {
        "system": "SYSTEM: You have these functions. Use them if required -\n" + json.dumps(BARE, indent=4),
        "chat": "USER: Weather in Oslo?\n\n\nASSISTANT: <functioncall> "
        '{"name": "weather", "arguments": \'{"city": "Oslo"}\'} <|endoftext|>\n\n\n'
        'FUNCTION RESPONSE: {"sky": "grey"}\n\n\nASSISTANT: Grey. <|endoftext|>\n\n\n',
    },
    "ToolACE": {
        "system": f"You compose functions. Here they are:\n{json.dumps([BARE])}. Put calls as [f(a=b)].",
        "conversations": [
            {"from": "user", "value": "Weather in Oslo?"},
            {"from": "assistant", "value": '[weather(city="Oslo")]'},
            {"from": "tool", "value": '[{"name": "weather", "results": {"sky": "grey"}}]'},
            {"from": "assistant", "value": "Grey."},
        ],
    },
}


@pytest.mark.parametrize("known_as", FORMATS)
def test_each_format_gives_the_same_conversation(tokenizer_of, tmp_path, known_as):
    result = read_examples(write(tmp_path, FORMATS[known_as]))
    [example] = result.examples
    [expected] = read_examples(write(tmp_path, openai())).examples
    assert [(turn.role, turn.content) for turn in example.messages] == [
        (turn.role, turn.content) for turn in expected.messages
    ]
    [call] = example.messages[1].calls
    assert (call.name, call.arguments) == ("weather", {"city": "Oslo"})
    assert (example.messages[2].answers, example.messages[2].name) == (call.id, "weather")
    assert example.tools == (SCHEMA,)
    assert learnt_texts(template_of(tokenizer_of, STYLES["objects"][0]), example) == [
        f"{BY_HAND}<|im_end|>",
        "Grey.<|im_end|>",
    ]
    named = [notice for notice in result.notices if "format" in notice]
    assert len(named) == (known_as in ("Hermes", "Glaive", "ToolACE")) and all(known_as in notice for notice in named)


def test_xlam_rows_are_a_question_and_the_calls_that_answer_it(tokenizer_of, tmp_path):
    tool = {"name": "weather", "parameters": {"city": {"type": "str"}, "days": {"type": "int, optional"}}}
    calls = [{"name": "weather", "arguments": {"city": "Oslo"}}] * 2
    row = {"id": 0, "query": "Oslo?", "answers": json.dumps(calls), "tools": json.dumps([tool])}
    result = read_examples(write(tmp_path, row))
    [example] = result.examples
    assert result.layout == "query/answers (xLAM)" and "xLAM" in result.notices[-1]
    assert [call.id for call in example.messages[1].calls] == ["call00001", "call00002"]
    assert example.tools[0]["function"]["parameters"] == {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    }
    assert learnt_texts(template_of(tokenizer_of, STYLES["objects"][0]), example) == [f"{BY_HAND * 2}<|im_end|>"]


def test_toolaces_calls_with_names_of_several_words_and_values_of_every_kind(tmp_path):
    tools = [{"name": "Market Trends API", "parameters": {"type": "dict", "properties": {}}}, {"name": "f"}]
    said = """[Market Trends API(kind="a) b, (c", n=-2.5, deep={'x': [1, True]}, on=true), f()]"""
    row = {
        "system": f"Functions: {json.dumps(tools)}",
        "conversations": [{"from": "user", "value": "?"}, {"from": "assistant", "value": said}],
    }
    [example] = read_examples(write(tmp_path, row)).examples
    assert [(call.name, call.arguments) for call in example.messages[1].calls] == [
        ("Market Trends API", {"kind": "a) b, (c", "n": -2.5, "deep": {"x": [1, True]}, "on": True}),
        ("f", {}),
    ]


@pytest.mark.parametrize("known_as", ["Hermes", "ToolACE"])
def test_calls_in_text_can_be_left_as_they_are(tokenizer_of, tmp_path, known_as):
    path = write(tmp_path, FORMATS[known_as])
    result = read_examples(path, FieldNames(calls_as_text=True))
    [example] = result.examples
    said = [turn["value"] for turn in FORMATS[known_as]["conversations"]]
    assert [turn.content for turn in example.messages[-4:]] == said[-4:]
    assert example.messages[0].role == "system" and not example.tools and not result.formats
    runs = learnt_texts(template_of(tokenizer_of, STYLES["objects"][0]), example)
    assert runs == [f"{said[-3]}<|im_end|>", "Grey.<|im_end|>"]


def test_arrows_nulls_are_no_arguments(tmp_path):
    """A column of structs has every key of every row; JSON's own nulls are arguments."""
    turns = [openai({"city": "Oslo"}), openai({"days": 3})]
    rows = [row["messages"][:2] for row in turns]
    pq.write_table(pa.table({"messages": rows, "tools": [[SCHEMA]] * 2}), tmp_path / "a.parquet")
    examples = read_examples(str(tmp_path / "a.parquet")).examples
    assert [example.messages[1].calls[0].arguments for example in examples] == [{"city": "Oslo"}, {"days": 3}]
    assert examples[0].tools == (SCHEMA,)
    [example] = read_examples(write(tmp_path, openai({"city": None}))).examples
    assert example.messages[1].calls[0].arguments == {"city": None}


def test_tools_from_a_file_are_for_rows_that_bring_none(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([BARE | {"name": "other"}]))
    fields = field_names(RowOptions(tools=str(tmp_path / "tools.json")))
    own, none = read_examples(write(tmp_path, openai(), openai(tools=[])), fields).examples
    assert own.tools == (SCHEMA,) and none.tools[0]["function"]["name"] == "other"
    for content in ("{}", "[]", "x", "[1]"):
        (tmp_path / "tools.json").write_text(content)
        with pytest.raises(ConfigError, match=r"tools: .*tools\.json"):
            field_names(RowOptions(tools=str(tmp_path / "tools.json")))


# ---- what is wrong -------------------------------------------------------------------------------

ANSWER = {"role": "assistant", "content": "x"}
USER = {"role": "user", "content": "q"}


def calling(call):
    return {"messages": [USER, {"role": "assistant", "tool_calls": [call]}, ANSWER]}


BAD = [
    (calling({"function": {"name": "f", "arguments": "{oops"}}), "odd-call", "turn 2 has a call of f whose arguments"),
    (calling({"function": {"name": "f", "arguments": "[1]"}}), "odd-call", "arguments are a list, not an object"),
    (calling({"function": {"arguments": "{}"}}), "odd-call", "without a name"),
    (calling(3), "odd-call", "a tool call that is a number"),
    ({"messages": [USER | {"tool_calls": [{"name": "f"}]}, ANSWER]}, "odd-call", "the assistant calls tools"),
    ({"messages": [USER, {"role": "function_call", "content": "f()"}]}, "odd-call", "turn 2 has role 'function_call'"),
    ({"messages": [USER, {"role": "tool", "content": "5"}, ANSWER]}, "stray-result", "turn 2 is the result of a call"),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "a", "name": "f"}]}]}
        | {"messages": [USER, {"role": "tool", "tool_call_id": "b", "content": "5"}, ANSWER]},
        "stray-result",
        "a call 'b' that no turn before it makes",
    ),
    ({"messages": [USER, ANSWER | {"content": "<tool_call>{f}</tool_call>"}]}, "odd-call", "a <tool_call> is no JSON"),
    ({"messages": [USER, ANSWER | {"weight": 0}]}, "nothing-to-learn", "each of its assistant turns is marked"),
]


@pytest.mark.parametrize("row, finding, detail", BAD)
def test_what_is_wrong_with_a_few_rows_is_dropped_named_and_counted(tokenizer_of, tmp_path, row, finding, detail):
    good = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a {n}"}]}
        for n in range(30)
    ]
    template = template_of(tokenizer_of, STYLES["objects"][0])
    data = prepare(write(tmp_path, *good, row), template, max_seq_len=256)
    [found] = [found for found in data.audit.findings if found.id == finding]
    assert (found.level, found.num_rows, found.rows) == ("warning", 1, ("a.jsonl:31",)) and detail in found.detail
    data.audit.check()
    data = prepare(write(tmp_path, *good[:5], row), template, max_seq_len=256)
    with pytest.raises(DataError, match=f"many-dropped.*{finding}"):
        data.audit.check()


LOSERS = {
    "calls": (chatml(""), "a tool call in message 2"),
    "arguments": (chatml("{{ c['function']['name'] }}"), "the argument city of weather in message 2"),
    "all but the first call": (chatml("{% if loop.first %}" + CALL + "{% endif %}"), "the argument city of weather"),
    "results": (
        chatml(CALL, words="m['content'] if m['content'] and m['role'] != 'tool' else ''"),
        "message 3, by tool",
    ),
    "tools": (chatml(CALL).removeprefix(HEAD), "has no place for the row's tools"),
    "all but the first tool": (chatml(CALL).replace("tools | tojson", "tools[0] | tojson"), "leaves out the tool two"),
}


@pytest.mark.parametrize("part", LOSERS)
def test_a_template_that_leaves_out_a_part_stops_and_names_it(tokenizer_of, tmp_path, part):
    text, detail = LOSERS[part]
    two = {"type": "function", "function": {"name": "two"}}
    row = openai(tools=[SCHEMA, two])
    second = {"id": "c2", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    row["messages"][1]["tool_calls"].append(second)
    data = prepare(write(tmp_path, row), template_of(tokenizer_of, text), max_seq_len=512)
    [found] = [found for found in data.audit.findings if found.id == "template-loses-content"]
    assert (found.level, found.rows) == ("error", ("a.jsonl:1",)) and detail in found.detail


def test_a_template_that_refuses_results_says_so(tokenizer_of, tmp_path):
    text = "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    text += chatml(CALL).partition("{% for m in messages %}")[2]
    data = prepare(write(tmp_path, openai(tools=[])), template_of(tokenizer_of, text), max_seq_len=512)
    [found] = [found for found in data.audit.findings if found.id == "template-refuses"]
    assert "no tools here" in found.detail
    with pytest.raises(DataError, match="no tools here"):
        data.audit.check()


def test_prompts_whose_tools_the_template_ignores_are_refused(tokenizer_of):
    template = template_of(tokenizer_of, chatml(CALL).removeprefix(HEAD))
    with pytest.raises(DataError, match="no place for"):
        template.encode_prompt([Message("user", "q")], [SCHEMA])


def test_each_row_of_the_documents_tables_is_a_test():
    page = (Path(__file__).parents[2] / "docs" / "conversations.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)(?:\[[^`]*\])?`", page))
    defined = {
        name
        for file in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert named and named <= defined
    assert {row for row in FORMATS if f"[{row}]`" not in page} == set()
    assert {style for style in STYLES if f"-{style}]`" not in page} == {"own end"}  # told with both ends
    oracles = (Path(__file__).with_name("test_renderers.py")).read_text(encoding="utf-8")
    families = re.findall(r'^    "([^"]+)": Family\(', oracles, re.MULTILINE)
    rows = [line.split(" | ")[0].removeprefix("| ") for line in page.partition("| family |")[2].splitlines()[2:]]
    assert rows[: len(families) + 1] == [*families, "Mistral"]


# ---- ends ----------------------------------------------------------------------------------------


def test_an_answer_without_an_end_is_ended_by_the_opening_of_the_next_turn(tokenizer_of):
    """GLM: the model stops where the user, or the tool, would begin."""
    text = (
        "{% for m in messages %}{% if m['role'] == 'tool' %}{{ '<|system|>' + m['content'] }}"
        "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endif %}"
        "{% for c in m['tool_calls'] or [] %}" + CALL + "{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    template = template_of(tokenizer_of, text)
    call = ToolCall("weather", {"city": "Oslo"}, "c")
    talk = (
        Message("user", "q"),
        Message("assistant", "", calls=(call,)),
        Message("tool", "grey", answers="c", name="weather"),
        Message("assistant", "Grey."),
        Message("user", "why"),
        Message("assistant", "No."),
    )
    assert learnt_texts(template, Example("x:1", messages=talk)) == [
        f"{BY_HAND}<|system|>",
        "Grey.<|user|>",
        "No.<|user|>",
    ]
    assert template.stop_ids == tuple(template.tokenizer.convert_tokens_to_ids(["<|user|>", "<|system|>", "</s>"]))
    [row] = template.encode_example(Example("x:1", messages=talk))
    asked = template.encode_prompt(talk[:5])
    assert row.input_ids[: len(asked)].tolist() == asked
