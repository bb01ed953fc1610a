"""Every format, every layout, and every way a file can be wrong (each named by file:line)."""

import gzip
import json
import re
from pathlib import Path

import pytest
from tiny import make_data

from nybble.data import readers
from nybble.data.examples import Message
from nybble.data.field_names import FieldNames
from nybble.data.readers import read_examples
from nybble.errors import ConfigError, DataError
from nybble.events import Event, Progress

ASKED, ANSWERED = Message("user", "hi"), Message("assistant", "yo")


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def read(source: str, **fields):
    return list(read_examples(source, FieldNames(**fields)).examples)


# ---- layouts


@pytest.mark.parametrize(
    "row, turns",
    [
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}, (ASKED, ANSWERED)),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, (ASKED, ANSWERED)),
        ({"prompt": "hi", "completion": "yo"}, (ASKED, ANSWERED)),
        ({"question": "hi", "answer": "yo"}, (ASKED, ANSWERED)),
        ({"instruction": "hi", "input": "", "output": "yo"}, (ASKED, ANSWERED)),
        ({"instruction": "hi", "input": "x", "output": "yo"}, (Message("user", "hi\n\nx"), ANSWERED)),
        ({"instruction": "hi", "context": "x", "response": "yo"}, (Message("user", "hi\n\nx"), ANSWERED)),
        ({"system_prompt": "s", "question": "hi", "response": "yo"}, (Message("system", "s"), ASKED, ANSWERED)),
        ({"messages": '[{"role": "user", "content": "hi"}, {"role": "model", "content": "yo"}]'}, (ASKED, ANSWERED)),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                    {"from": "gpt", "value": "yo"},
                ]
            },
            (ASKED, ANSWERED),
        ),
    ],
)
def test_layouts_are_detected(write, row, turns):
    [example] = read(write("a.jsonl", json.dumps(row)))
    assert example.conversation() == turns and example.origin == "a.jsonl:1"


def test_columns_that_nothing_reads_are_counted_and_those_that_teach_are_named(write):
    row = {"id": 1, "question": "hi", "answer": "yo", "system": "s", "input": "x", "note": None}
    result = read_examples(write("a.jsonl", f"{json.dumps(row)}\n{json.dumps({**row, 'input': '', 'id': {'a': []}})}"))
    assert result.layout == "question/answer" and result.unread == {"id": 2, "input": 1}
    assert list(result.left_out) == [("a.jsonl:1", "input")]


@pytest.mark.parametrize(
    "more, teaches",
    [
        ({"weight": 0}, True),
        ({"weight": 1, "train": True}, False),
        ({"context": "the page that is asked about"}, True),
        ({"audios": ["a.wav"]}, True),
        ({"images": [], "score": float("nan")}, False),
        ({"label": False}, True),
        ({"label": True, "label_id": 3}, False),
        ({"source": "web", "prompt_id": "x"}, False),
    ],
)
def test_what_teaches_is_told_from_what_does_not(write, more, teaches):
    result = read_examples(write("a.jsonl", json.dumps({"prompt": "p", "completion": "c", **more})))
    assert bool(result.left_out) == teaches


def test_texts_with_labels_are_no_plain_texts(write):
    result = read_examples(write("a.jsonl", '{"text": "good", "label": 1}'))
    assert list(result.left_out) == [("a.jsonl:1", "label")]


@pytest.mark.parametrize("said, text", [("3", "3"), ("4.50", "4.5"), ("true", "true"), ("1e-7", "1e-07"), ("-0", "0")])
def test_numbers_and_booleans_are_read_as_json_writes_them(write, said, text):
    result = read_examples(write("a.jsonl", f'{{"prompt": "p", "completion": {said}}}'))
    assert result.examples[0].completion == text
    assert result.as_text[0][0] == "a.jsonl:1" and repr(text) in result.as_text[0][1]
    in_turn = f'{{"messages": [{{"role": "user", "content": "q"}}, {{"role": "assistant", "content": {said}}}]}}'
    result = read_examples(write("b.jsonl", in_turn))
    assert result.examples[0].messages == (Message("user", "q"), Message("assistant", text))
    assert "turn 2: " in result.as_text[0][1] and repr(text) in result.as_text[0][1]


def test_prompts_and_completions_that_are_conversations(write):
    """TRL's form: the completion alone is learnt, though the prompt holds answers too."""
    system, user, answer = ({"role": role, "content": role[0]} for role in ("system", "user", "assistant"))
    row = {"prompt": [system, user, answer, user], "completion": [answer]}
    [example] = read(write("a.jsonl", json.dumps(row)))
    assert [turn.role for turn in example.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn.supervised for turn in example.messages] == [False, False, False, False, True]
    [half] = read(write("b.jsonl", json.dumps({"prompt": "u", "completion": [answer]})))
    [other] = read(write("c.jsonl", json.dumps({"prompt": [user], "completion": "a"})))
    assert half.messages == other.messages == (Message("user", "u"), Message("assistant", "a"))


def test_text_rows(write):
    [example] = read(write("a.jsonl", '{"text": "hello"}'))
    assert example.text == "hello" and example.messages is None


@pytest.mark.parametrize(
    "row, fields, turns",
    [
        ({"q": "hi", "a": "yo"}, {"prompt": "q", "completion": "a"}, (ASKED, ANSWERED)),
        ({"prompt": "hi", "a": "yo", "completion": "no"}, {"completion": "a"}, (ASKED, ANSWERED)),
        ({"chat": [{"from": "human", "value": "hi"}], "prompt": "", "completion": ""}, {"messages": "chat"}, (ASKED,)),
    ],
)
def test_own_column_names(write, row, fields, turns):
    assert read(write("a.jsonl", json.dumps(row)), **fields)[0].conversation() == turns


def test_own_text_column(write):
    assert read(write("a.jsonl", '{"body": "b", "prompt": "p", "completion": "c"}'), text="body")[0].text == "b"


def test_own_columns_of_two_forms_are_refused():
    with pytest.raises(ConfigError, match="'q', 't'"):
        FieldNames(prompt="q", text="t")


# ---- files

PAIRS = [{"prompt": f'question {n},\nsecond "line" \u2028 é', "completion": f"answer {n}"} for n in range(3)]


def contents(source: str) -> list[tuple[str, str, str]]:
    return [(example.origin, example.prompt, example.completion) for example in read(source)]


def expected(name: str, lines: tuple[int, ...] = (1, 2, 3)) -> list[tuple[str, str, str]]:
    return [(f"{name}:{line}", pair["prompt"], pair["completion"]) for line, pair in zip(lines, PAIRS, strict=True)]


@pytest.mark.parametrize("newline", ("\n", "\r\n", "\n\n"))
@pytest.mark.parametrize("mark", (b"", b"\xef\xbb\xbf"))
def test_json_lines(write, newline, mark):
    text = newline.join(json.dumps(pair, ensure_ascii=False) for pair in PAIRS)
    lines = (1, 3, 5) if newline == "\n\n" else (1, 2, 3)
    assert contents(write("a.jsonl", mark + text.encode())) == expected("a.jsonl", lines)


@pytest.mark.parametrize(
    "text, lines",
    [
        (json.dumps(PAIRS), (1, 1, 1)),
        (json.dumps(PAIRS, indent=2), (2, 6, 10)),
        (json.dumps({"about": {"rows": []}, "n": [], "data": PAIRS}, indent=2).replace('"n": [],\n', ""), (4, 8, 12)),
        (json.dumps({"data": PAIRS}), (1, 1, 1)),
        ("\n".join(json.dumps(pair) for pair in PAIRS), (1, 2, 3)),
    ],
)
def test_json(write, text, lines):
    origins = [origin for origin, *_ in contents(write("a.json", text))]
    found = [int(origin.removeprefix("a.json:")) for origin in origins]
    source = text.splitlines()
    assert contents(write("a.json", text)) == expected("a.json", tuple(found))
    if len(source) > 3:  # the named line is where the row begins: its prompt is on it or the next
        assert all(f"question {n}" in source[line] for n, line in enumerate(found))
    else:
        assert tuple(found) == lines


@pytest.mark.parametrize("name, delimiter", [("a.csv", ","), ("a.tsv", "\t")])
@pytest.mark.parametrize("newline", ("\n", "\r\n"))
def test_csv(write, name, delimiter, newline):
    def quote(value: str) -> str:
        return '"' + value.replace('"', '""') + '"'

    lines = [delimiter.join(quote(pair[key]) for key in ("prompt", "completion")) for pair in PAIRS]
    text = newline.join([delimiter.join(("prompt", "completion")), *lines, ""])
    assert contents(write(name, "\ufeff" + text)) == expected(name, (2, 4, 6))


def test_parquet(tmp_path):
    import datasets

    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(PAIRS).to_parquet(path)
    assert contents(str(path)) == expected("a.parquet")


def test_parquet_messages(tmp_path):
    import datasets

    path = tmp_path / "a.parquet"
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    datasets.Dataset.from_list([row]).to_parquet(path)
    assert read(str(path))[0].messages == (ASKED, ANSWERED)


# ---- bad input: each names the place, what is allowed, and never shows a traceback's text

GOOD = '{"prompt": "p", "completion": "c"}'
BAD = [
    ("a.jsonl", "", r"a\.jsonl: no rows"),
    ("a.jsonl", "\n \n", r"a\.jsonl: no rows"),
    ("a.json", "", r"a\.json: no rows"),
    ("a.json", "[]", r"a\.json: no rows"),
    ("a.csv", "", r"a\.csv: no rows"),
    ("a.csv", "prompt,completion\n", r"a\.csv: no rows"),
    ("a.jsonl", f"{GOOD}\nnot json", r"a\.jsonl:2: not JSON: Expecting value at column 1"),
    ("a.jsonl", f'{GOOD}\n{{"prompt": "p",', r"a\.jsonl:2: not JSON"),
    ("a.jsonl", f"{GOOD}{GOOD}", r"a\.jsonl:1: not JSON: Extra data"),
    ("a.jsonl", f"{GOOD}\n[1]", r"a\.jsonl:2: the row is a list"),
    ("a.jsonl", '"x"', r"a\.jsonl:1: the row is text"),
    ("a.jsonl", f"{GOOD}\nnull", r"a\.jsonl:2: the row is null"),
    ("a.jsonl", f'{GOOD}\n{{"prompt": "p", "answer": "c"}}', r"a\.jsonl:2: no column 'completion'.*'prompt', 'answer'"),
    ("a.jsonl", f'{GOOD}\n{{"prompt": "p", "completion": [3]}}', r"a\.jsonl:2: turn 1 is a number"),
    ("a.jsonl", f'{GOOD}\n{{"prompt": "p", "completion": {{}}}}', r"a\.jsonl:2: 'completion' is an empty object"),
    ("a.jsonl", f'{GOOD}\n{{"prompt": "p", "completion": NaN}}', r"a\.jsonl:2: 'completion' is nan, no number"),
    ("a.jsonl", '{"prompt": "p", "completion": null}', r"a\.jsonl:1: 'completion' is null"),
    ("a.jsonl", '{"prompt": "p", "completion": "c", "prompt": "q"}', r"a\.jsonl:1: the key 'prompt' stands twice"),
    ("a.jsonl", '{"prompt": "p", "completion": "\\ud800"}', r"a\.jsonl:1: 'completion' has half a surrogate"),
    ("a.jsonl", b'{"prompt": "p", "completion": "\x00"}', r"a\.jsonl:1: not JSON: Invalid control character"),
    ("a.jsonl", GOOD.encode() + b"\n\xff", r"a\.jsonl:2: byte 0xff is not UTF-8"),
    ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: JSON nested too deeply"),
    ("a.json", b'{"a":\n\xff}', r"a\.json:2: byte 0xff"),
    ("a.json", f"[{GOOD},\n{GOOD}", r"a\.json:2: not JSON"),
    ("a.json", f"[{GOOD},\n3]", r"a\.json:2: the row is a number"),
    ("a.json", "3", r"a\.json:1: the row is a number"),
    ("a.json", '{"a": [], "b": []}', r"a\.json: an object holding 2 lists"),
    ("a.csv", "prompt,completion\np,c\np\n", r"a\.csv:3: 1 columns; the heading has 2"),
    ("a.csv", "prompt,completion\np,c,d\n", r"a\.csv:2: 3 columns; the heading has 2"),
    ("a.csv", "prompt,prompt\np,c\n", r"a\.csv:1: column 'prompt'.*twice"),
    ("a.csv", 'prompt,completion\np,"c\n', r"a\.csv:\d: not CSV"),
    ("a.csv", "a,b\n1,2\n", r"a\.csv:2: unknown format, columns 'a', 'b'"),
    ("a.parquet", "not parquet", r"a\.parquet: not readable as Parquet"),
    ("a.exe", "hello", r"a\.exe: a file ending in '\.exe'\nallowed: files ending in \.jsonl"),
    ("a.jsonl", b"PAR1" + bytes(32), r"a\.jsonl: it is Parquet, not text"),
    ("a.csv", b"PK\x03\x04" + bytes(32), r"a\.csv: it is a ZIP archive, as Excel workbooks are, not text"),
    ("a.jsonl.gz", b"\x1f\x8b\x08\x00" + bytes(32), r"a\.jsonl\.gz: damaged as gzip"),
    (
        "a.jsonl",
        '{"prompt": "p", "chosen": "c", "rejected": "r"}',
        r"a\.jsonl:1: rows of preferences(?s:.*)field chosen",
    ),
    (
        "a.jsonl",
        '{"input_ids": [1], "labels": [1]}',
        r"a\.jsonl:1: rows that are token ids already(?s:.*)give the text",
    ),
    ("a.json", '{"train": [{"text": "a"}], "test": [{"text": "b"}]}', r"holding 2 lists: 'train' \(1\), 'test' \(1\)"),
    (
        "a.jsonl",
        '{"foo": 1, "bar": 2}',
        r"(?s)a\.jsonl:1: unknown format, columns 'foo', 'bar'.*messages.*--prompt-field",
    ),
    ("a.jsonl", '{"messages": []}', r"a\.jsonl:1: 'messages' is an empty list"),
    ("a.jsonl", '{"messages": "[1"}', r"a\.jsonl:1: column 'messages': not JSON"),
    ("a.jsonl", '{"messages": ["hi"]}', r"a\.jsonl:1: turn 1 is text"),
    ("a.jsonl", '{"messages": [{"role": "wizard", "content": ""}]}', r"a\.jsonl:1: turn 1: role is 'wizard'"),
    ("a.jsonl", '{"messages": [{"author": "me"}]}', r"a\.jsonl:1: turn 1 has keys 'author'"),
    ("a.jsonl", '{"messages": [{"role": "user"}]}', r"a\.jsonl:1: turn 1: 'content' is null"),
    (
        "a.jsonl",
        '{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}',
        r"a\.jsonl:1: turn 1 has a tool call that is a number",
    ),
]


@pytest.mark.parametrize("name, content, message", BAD)
def test_bad_files(write, name, content, message):
    """Refused where no row can be read; beside rows that can be, the others are kept with the reason."""
    try:
        told = "\n".join(map(str, read_examples(write(name, content)).odd))
    except DataError as error:
        assert error.exit_code == 2
        told = str(error)
    assert re.search(message, told), told


@pytest.mark.parametrize("name", ("missing.jsonl", "no/such.csv", "missing"))
def test_missing_file(tmp_path, name):
    with pytest.raises(DataError, match=r"no such file\nallowed: .*\.jsonl.*builtin:pydoc\nlooked in"):
        read(str(tmp_path / name))


def test_an_empty_folder(tmp_path):
    with pytest.raises(DataError, match="a folder without examples"):
        read(str(tmp_path))


def test_unknown_builtin():
    with pytest.raises(DataError, match="allowed: builtin:pydoc"):
        read("builtin:poems")


def test_own_column_that_is_not_there(write):
    with pytest.raises(DataError, match=r"a\.jsonl:1: no column 'q'; it has 'prompt', 'completion'"):
        read(write("a.jsonl", GOOD), prompt="q")


def test_hub_without_network_says_so():
    """The hub library read HF_HUB_OFFLINE, which the tests set before anything imports it."""
    with pytest.raises(DataError, match=r"(?s)nobody/nothing: the hub cannot be reached.*needs a network"):
        read("nobody/nothing")


def test_reading_many_rows_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MANY", 10)
    path = make_data(tmp_path / "rows.jsonl", [{"text": "word " * 2000} for _ in range(35)])
    heard: list[Event] = []
    read_examples(str(path), report=heard.append)
    steps = [(event.done, event.total) for event in heard if isinstance(event, Progress)]
    assert len(steps) == 3 and {total for _, total in steps} == {path.stat().st_size}
    assert [done for done, _ in steps] == sorted({done for done, _ in steps}) and 0 < steps[0][0] < steps[-1][1]
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    heard.clear()
    read_examples(str(packed), report=heard.append)
    assert not heard, "how far a packed file is, its bytes do not say"
