"""Every format, every layout, and every way a file can be wrong (each named by file:line)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nybble.data.examples import Message
from nybble.data.readers import FieldNames, read_examples
from nybble.errors import ConfigError, DataError

ASKED, ANSWERED = Message("user", "hi"), Message("assistant", "yo")


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def read(source: str, **fields):
    return read_examples(source, FieldNames(**fields)).examples


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


def test_columns_that_nothing_reads_are_said(write):
    row = {"id": 1, "question": "hi", "answer": "yo", "system": "s", "input": "x"}
    assert read_examples(write("a.jsonl", json.dumps(row))).layout == "question/answer, not read: id, input"


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
    ("a.jsonl", f'{GOOD}\n{{"prompt": "p", "completion": 3}}', r"a\.jsonl:2: 'completion' is a number\nneeded: text"),
    ("a.jsonl", '{"prompt": "p", "completion": null}', r"a\.jsonl:1: 'completion' is null"),
    ("a.jsonl", '{"prompt": "p", "completion": "c", "prompt": "q"}', r"a\.jsonl:1: the key 'prompt' stands twice"),
    ("a.jsonl", '{"prompt": "p", "completion": "\\ud800"}', r"a\.jsonl:1: 'completion' has half a surrogate"),
    ("a.jsonl", b'{"prompt": "p", "completion": "\x00"}', r"a\.jsonl:1: not JSON: Invalid control character"),
    ("a.jsonl", GOOD.encode() + b"\n\xff", r"a\.jsonl:2: byte 0xff is not UTF-8"),
    ("a.jsonl", GOOD.encode("utf-16"), r"a\.jsonl:1: UTF-16"),
    ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: JSON nested too deeply"),
    ("a.json", b'{"a":\n\xff}', r"a\.json:2: byte 0xff"),
    ("a.json", f"[{GOOD},\n{GOOD}", r"a\.json:2: not JSON"),
    ("a.json", f"[{GOOD},\n3]", r"a\.json:2: the row is a number"),
    ("a.json", "3", r"a\.json: a number"),
    ("a.json", '{"a": [], "b": []}', r"a\.json: an object holding 2 lists"),
    ("a.csv", "prompt,completion\np,c\np\n", r"a\.csv:3: 1 columns\nneeded: 2"),
    ("a.csv", "prompt,completion\np,c,d\n", r"a\.csv:2: 3 columns\nneeded: 2"),
    ("a.csv", "prompt,prompt\np,c\n", r"a\.csv:1: column 'prompt'.*twice"),
    ("a.csv", 'prompt,completion\np,"c\n', r"a\.csv:\d: not CSV"),
    ("a.csv", "a,b\n1,2\n", r"a\.csv:2: unknown format, columns 'a', 'b'"),
    ("a.parquet", "not parquet", r"a\.parquet: not readable as Parquet"),
    ("a.txt", "hello", r"a\.txt: a file ending in '\.txt'\nallowed: one file ending in \.jsonl"),
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
        r"a\.jsonl:1: turn 1 has tool_calls",
    ),
]


@pytest.mark.parametrize("name, content, message", BAD)
def test_bad_files(write, name, content, message):
    with pytest.raises(DataError, match=message) as error:
        read(write(name, content))
    assert error.value.exit_code == 2


@pytest.mark.parametrize("name", ("missing.jsonl", "no/such.csv", "missing"))
def test_missing_file(tmp_path, name):
    with pytest.raises(DataError, match=r"no such file\nallowed: .*\.jsonl.*builtin:pydoc\nlooked in"):
        read(str(tmp_path / name))


def test_folder(tmp_path):
    with pytest.raises(DataError, match="a folder"):
        read(str(tmp_path))


def test_unknown_builtin():
    with pytest.raises(DataError, match="allowed: builtin:pydoc"):
        read("builtin:poems")


def test_own_column_that_is_not_there(write):
    with pytest.raises(DataError, match=r"a\.jsonl:1: no column 'q'; it has 'prompt', 'completion'"):
        read(write("a.jsonl", GOOD), prompt="q")


def test_hub_without_network_says_so():
    """In a process of its own: the hub library reads HF_HUB_OFFLINE when it is imported."""
    code = (
        "from nybble.data.readers import read_examples\n"
        "from nybble.errors import DataError\n"
        "try:\n    read_examples('nobody/nothing')\n"
        "except DataError as error:\n    print(error)\n"
    )
    root = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": root}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "nobody/nothing: the hub cannot be reached" in result.stdout, result.stderr
    assert "needs a network" in result.stdout
