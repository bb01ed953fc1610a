"""Bad examples and bad files of options."""

import gzip
import json
import lzma
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bad_file import GOOD, GOOD_ROWS, MEGABYTES_2, BadFile, Build


def data_file(file: str, content: bytes) -> Build:
    def build(folder: Path, model: Path) -> list[str]:
        (folder / file).write_bytes(content)
        return ["data", "check", "--model", str(model), "--data", str(folder / file)]

    return build


def no_rows(folder: Path, model: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    columns = {"prompt": pyarrow.array([], pyarrow.string()), "completion": pyarrow.array([], pyarrow.string())}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "r.parquet")
    return ["data", "check", "--model", str(model), "--data", str(folder / "r.parquet")]


def message_row(*turns: Any) -> bytes:
    return json.dumps({"messages": list(turns)}).encode()


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
BAD_LINES = {
    "truncated": b'{"prompt": "a", "completion": "b"',
    "trailing comma": b'{"prompt": "a", "completion": "b",}',
    "single quotes": b"{'prompt': 'a', 'completion': 'b'}",
    "bare words": b"{prompt: a, completion: b}",
    "NaN": b"NaN",
    "number": b"17",
    "string": b'"prompt"',
    "null": b"null",
    "list": b'["a", "b"]',
    "true": b"true",
    "duplicate key": b'{"prompt": "a", "prompt": "c", "completion": "b"}',
    "duplicate key inside": b'{"prompt": "a", "completion": "b", "more": {"x": 1, "x": 2}}',
    "not UTF-8": b'{"prompt": "\xff\xfe\xfa", "completion": "b"}',
    "Latin-1": '{"prompt": "é", "completion": "b"}'.encode("latin-1"),
    "overlong UTF-8": b'{"prompt": "\xc0\xaf", "completion": "b"}',
    "surrogates in UTF-8": b'{"prompt": "\xed\xa0\x80", "completion": "b"}',
    "raw NUL": b'{"prompt": "a\0b", "completion": "b"}',
    "line of NULs": b"\0" * 64,
    "raw control character": b'{"prompt": "a\x1bb", "completion": "b"}',
    "lone high surrogate": b'{"prompt": "a\\ud800", "completion": "b"}',
    "lone low surrogate": b'{"prompt": "a", "completion": "\\udc00b"}',
    "surrogates the wrong way round": b'{"prompt": "a", "completion": "\\udc00\\ud800"}',
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "deep and closed": b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b', "completion": "b"}',
    "two objects": b'{"prompt": "a", "completion": "b"} {"prompt": "a", "completion": "b"}',
    "bad escape": b'{"prompt": "\\x41", "completion": "b"}',
    "half an escape": b'{"prompt": "\\u12", "completion": "b"}',
    "binary": bytes(range(1, 256)).replace(b"\n", b"").replace(b"\r", b""),
}
# Of another form than the other rows: dropped with a warning up to a tenth of them.
ODD_LINES = {
    "missing completion": b'{"prompt": "a"}',
    "null completion": b'{"prompt": "a", "completion": null}',
    "list completion": b'{"prompt": "a", "completion": ["b"]}',
    "object completion": b'{"prompt": "a", "completion": {"text": "b"}}',
    "infinite prompt": b'{"prompt": 1e999, "completion": "b"}',
    "empty object": b"{}",
}
ODD_ENOUGH = 5  # beside the good rows
BAD_MESSAGES = {
    "unknown role": message_row(USER, {"role": "wizard", "content": "b"}),
    "no role": message_row(USER, {"content": "b"}),
    "list as a role": message_row(USER, {"role": ["assistant"], "content": "b"}),
    "no content": message_row(USER, {"role": "assistant"}),
    "null content": message_row(USER, {"role": "assistant", "content": None}),
    "image": message_row({"role": "user", "content": [{"type": "image", "url": "file:///etc/passwd"}]}, ANSWER),
    "tool call": message_row(USER, {"role": "assistant", "content": "b", "tool_calls": [{"id": 1}]}),
    "no turns": b'{"messages": []}',
    "object of turns": b'{"messages": {"role": "user"}}',
    "null turns": b'{"messages": null}',
    "text of turns": b'{"messages": "[{"}',
    "turn is text": message_row("hello"),
    "turn is null": message_row(None),
    "surrogate in a turn": message_row({"role": "user", "content": "\ud83d"}, ANSWER),
    "two spellings": message_row({"from": "human", "content": "a"}, ANSWER),
    "duplicate role": b'{"messages": [{"role": "user", "role": "system", "content": "a"}]}',
}


def each_of(kind: str, contents: dict[str, tuple[bytes, str]]) -> Iterator[BadFile]:
    """Files of one kind: name of the case -> what is in the file, and the place that its message names."""
    for name, (content, place) in contents.items():
        yield BadFile(f"{kind}: {name}", data_file(f"r.{kind}", content), (place,))


def data_cases() -> Iterator[BadFile]:
    times = dict.fromkeys(BAD_LINES, 1) | dict.fromkeys(ODD_LINES, ODD_ENOUGH)
    for name, line in (BAD_LINES | ODD_LINES).items():
        for number in (1, 5):
            content = (GOOD * (number - 1)) % ((0,) * 2 * (number - 1)) + (line + b"\n") * times[name] + GOOD_ROWS
            yield BadFile(f"jsonl, line {number}: {name}", data_file("r.jsonl", content), (f"r.jsonl:{number}",))
    for name, line in BAD_MESSAGES.items():
        good = message_row(USER, ANSWER) + b"\n"
        yield BadFile(f"messages: {name}", data_file("r.jsonl", good + line + b"\n" + good), ("r.jsonl:2",))
    for name, roles in {
        "only user": [USER],
        "only assistant": [ANSWER],
        "nobody": [{**USER, "role": "system"}],
    }.items():
        yield BadFile(f"messages: {name}", data_file("r.jsonl", message_row(*roles) + b"\n"), ("r.jsonl:1",))
    whole = {
        "empty": (b"", "r.jsonl"),
        "white space": (b" \n\t\n\r\n", "r.jsonl"),
        "byte order mark alone": (b"\xef\xbb\xbf", "r.jsonl"),
        "UTF-16 without its end": (GOOD_ROWS.decode().encode("utf-16")[:-1], "r.jsonl"),
        "gzip": (b"\x1f\x8b\x08\x00" + bytes(64), "r.jsonl"),
        "gzip without its end": (gzip.compress(GOOD_ROWS)[:-20], "r.jsonl"),
        "xz without its end": (lzma.compress(GOOD_ROWS)[:-20], "r.jsonl"),
        "Zstandard's mark alone": (b"\x28\xb5\x2f\xfd", "r.jsonl"),
        "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(64), "r.jsonl"),
        "pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x8c\x05posix\x94", "r.jsonl:1"),
        "2 MB without an end": (b"x" * MEGABYTES_2, "r.jsonl:1"),
        "2 MB of brackets": (b"[" * MEGABYTES_2, "r.jsonl:1"),
        "2 MB of NULs": (bytes(MEGABYTES_2), "r.jsonl:1"),
        "2 MB of quotes": (b'"' * MEGABYTES_2, "r.jsonl:1"),
        "2 MB row": (GOOD_ROWS + b'{"prompt": "a", "completion": "' + b"b" * MEGABYTES_2 + b'"}\n', "r.jsonl:31"),
        "2 MB prompt of words": (
            GOOD_ROWS + b'{"prompt": "' + b"a " * 1_000_000 + b'", "completion": "b"}',
            "r.jsonl:31",
        ),
        "4 MB of a character of 4 bytes": (
            GOOD_ROWS + b'{"prompt": "a", "completion": "' + "\U0001f600".encode() * 1_100_000 + b'"}',
            "r.jsonl:31",
        ),
        "2 MB of keys": (
            b"{" + b",".join(b'"k%d": 0' % n for n in range(140_000)) + b"}",
            "r.jsonl:1",
        ),
        "20,000 empty objects": (b"{}\n" * 20_000, "r.jsonl:1"),
        "unknown columns": (b'{"frage": "a", "antwort": "b"}\n', "r.jsonl:1"),
        "surrogate as a column": (b'{"\\ud800": "a"}\n', "r.jsonl:1"),
        "terminal escape as a column": (b'{"\\u001b[2J\\u001b]0;x\\u0007": "a"}\n', "r.jsonl:1"),
        "byte order mark before a bad row": (b'\xef\xbb\xbf{"prompt": "a"}\n', "r.jsonl:1"),
        "CRLF": (GOOD_ROWS.replace(b"\n", b"\r\n") + b'{"prompt": "a"}\r\n' * ODD_ENOUGH, "r.jsonl:31"),
        "all answers empty": (b'{"prompt": "a", "completion": " "}\n' * 20, "r.jsonl:1"),
    }
    yield from each_of("jsonl", whole)
    rows = [{"prompt": "a", "completion": "b"}] * 3
    documents = {
        "truncated list": (json.dumps(rows)[:-5].encode(), "r.json:1"),
        "object without a list": (b'{"a": 1}', "r.json"),
        "object with two lists": (json.dumps({"a": rows, "b": rows}).encode(), "r.json"),
        "number": (b"3", "r.json"),
        "text": (b'"rows"', "r.json"),
        "null": (b"null", "r.json"),
        "empty list": (b"[]", "r.json"),
        "list of numbers": (b"[1, 2]", "r.json:1"),
        "bad row": (b'[\n{"prompt": "a", "completion": "b"},\n{"prompt": "a"}\n]', "r.json:3"),
        "bad row inside": (b'{"meta": 1, "rows": [\n{"prompt": "a", "completion": "b"},\n7]}', "r.json:3"),
        "duplicate key": (b'[{"prompt": "a", "prompt": "b", "completion": "c"}]', "r.json"),
        "trailing garbage": (json.dumps(rows).encode() + b"]", "r.json:1"),
        "deep lists": (b"[" * 200_000, "r.json"),
        "not UTF-8": (b'[\n{"prompt": "\xff", "completion": "b"}]', "r.json:2"),
        "lists of rows": (json.dumps({"train": rows, "test": rows}).encode(), "r.json"),
        "endless number": (b"[" + b"9" * 10_000 + b"]", "r.json"),
        "empty": (b"", "r.json"),
        "Infinity": (b"-Infinity", "r.json"),
        "lone surrogate": (b'[{"prompt": "\\udfff", "completion": "b"}]', "r.json:1"),
        "2 MB of one object": (b'{"a": "' + b"x" * MEGABYTES_2, "r.json"),
    }
    yield from each_of("json", documents)
    tables = {
        "empty": (b"", "r.csv"),
        "heading alone": (b"prompt,completion\n", "r.csv"),
        "unknown columns": (b"a,b\n1,2\n", "r.csv:2"),
        "column twice": (b"prompt,completion,prompt\na,b,c\n", "r.csv:1"),
        "too many cells": (b"prompt,completion\na,b\na,b,c\n", "r.csv:3"),
        "too few cells": (b"prompt,completion\na,b\na\n", "r.csv:3"),
        "open quote": (b'prompt,completion\na,"b\n', "r.csv"),
        "text behind a quote": (b'prompt,completion\na,"b"c\n', "r.csv:2"),
        "not UTF-8": (b"prompt,completion\na,\xff\n", "r.csv:2"),
        "byte order mark and CRLF": (b"\xef\xbb\xbfprompt,completion\r\na,b\r\na\r\n", "r.csv:3"),
        "2 MB cell": (b"prompt,completion\na," + b"x" * MEGABYTES_2 + b"\n", "r.csv:2"),
        "2 MB of commas": (b"," * MEGABYTES_2, "r.csv:1"),
    }
    yield from each_of("csv", tables)
    parquet = {
        "empty": b"",
        "text": GOOD_ROWS,
        "magic alone": b"PAR1PAR1",
        "endless footer": b"PAR1" + bytes(32) + struct.pack("<I", 2**32 - 1) + b"PAR1",
        "garbage footer": b"PAR1" + b"\xff" * 64 + struct.pack("<I", 64) + b"PAR1",
        "truncated": b"PAR1" + bytes(1000),
    }
    yield from each_of("parquet", {name: (content, "r.parquet") for name, content in parquet.items()})
    yield BadFile("parquet: no rows", no_rows, ("r.parquet",))
    yield BadFile("data: unknown kind", data_file("r.exe", b"MZ"), ("r.exe", ".jsonl"))
    yield BadFile(
        "data: no such file",
        lambda f, m: ["data", "check", "--model", str(m), "--data", str(f / "r.jsonl")],
        ("r.jsonl",),
    )
    yield BadFile("data: a folder", lambda f, m: ["data", "check", "--model", str(m), "--data", str(f)], ("a folder",))


# ---- options


def yaml_file(content: bytes) -> Build:
    def build(folder: Path, model: Path) -> list[str]:
        (folder / "run.yaml").write_bytes(content)
        return ["train", str(folder / "run.yaml")]

    return build


REQUIRED = b"model: m\ndata: d.jsonl\nout: runs/x\n"
LAUGHS = b"a0: &a0 [1,1,1,1,1,1,1,1,1]\n" + b"".join(
    b"a%d: &a%d [*a%d,*a%d,*a%d,*a%d,*a%d,*a%d,*a%d,*a%d]\n" % (n, n, *[n - 1] * 8) for n in range(1, 12)
)


def yaml_cases() -> Iterator[BadFile]:
    contents = {
        "unknown key": REQUIRED + b"rnak: 4\n",
        "tab": REQUIRED + b"\trank: 4\n",
        "open list": REQUIRED + b"rank: [4\n",
        "open quote": REQUIRED + b'rank: "4\n',
        "key twice": REQUIRED + b"rank: 4\nrank: 8\n",
        "key twice in two spellings": REQUIRED + b"max-steps: 4\nmax_steps: 8\n",
        "list": b"- model\n- data\n",
        "text": b"model\n",
        "number": b"3\n",
        "NUL": REQUIRED + b"rank: \0\n",
        "not UTF-8": REQUIRED + b"rank: \xff\n",
        "UTF-16": REQUIRED.decode().encode("utf-16"),
        "bomb of aliases": LAUGHS + REQUIRED,
        "bomb of aliases as a value": REQUIRED + b"rank: [" + b"*".join([b""]) + b"&x [&y [1]], *x, *y]\n",
        "alias of itself": REQUIRED + b"rank: &a [*a]\n",
        "unknown alias": REQUIRED + b"rank: *nobody\n",
        "deep lists": REQUIRED + b"rank: " + b"[" * 5_000,
        "deep objects": REQUIRED + b"rank: " + b"{a: " * 5_000,
        "Python object": REQUIRED + b"rank: !!python/object/apply:os.system ['true']\n",
        "Python name": REQUIRED + b"rank: !!python/name:os.system\n",
        "unknown tag": REQUIRED + b"rank: !nybble 4\n",
        "impossible date": REQUIRED + b"rank: 2024-99-99\n",
        "endless number": REQUIRED + b"rank: " + b"9" * 10_000 + b"\n",
        "binary": REQUIRED + b"rank: !!binary '?'\n",
        "list as a key": REQUIRED + b"? [a, b]\n: 4\n",
        "object as a key": REQUIRED + b"? {a: b}\n: 4\n",
        "null as a key": REQUIRED + b"~: 4\n",
        "too large": REQUIRED + b"#" * 2_000_000,
        "negative": REQUIRED + b"rank: -4\n",
        "fraction": REQUIRED + b"rank: 2.5\n",
        "switch for a number": REQUIRED + b"rank: yes\n",
        "NaN": REQUIRED + b"lr: .nan\n",
        "infinity": REQUIRED + b"lr: .inf\n",
        "block size": REQUIRED + b"block-size: 7\n",
        "seed": REQUIRED + b"seed: 1099511627776\n",
        "keep": REQUIRED + b"keep: all\n",
        "save-every": REQUIRED + b"save-every: 0m\n",
        "allow-change": REQUIRED + b"allow-change: everything\n",
        "object for a name": b"model: {a: b}\ndata: d\nout: o\n",
        "NUL in a path": b'model: "m\\0"\ndata: d\nout: o\n',
        "surrogate in a path": b'model: m\ndata: "d\\ud800"\nout: o\n',
        "NUL in the output": b'model: m\ndata: d\nout: "o\\0"\n',
        "micro-batch above step": REQUIRED + b"micro-batch-size: 99\n",
        "5,000 keys": REQUIRED + b"".join(b"k%d: 1\n" % n for n in range(5_000)),
        "two documents": REQUIRED + b"---\n" + REQUIRED,
        "merge of a number": REQUIRED + b"<<: 4\n",
        "directive": b"%YAML 9.9\n---\n" + REQUIRED,
    }
    for name, content in contents.items():
        yield BadFile(f"yaml: {name}", yaml_file(content), ("run.yaml",) if name != "micro-batch above step" else ())
    missing = {"model": b"data: d\nout: o\n", "data": b"model: m\nout: o\n", "out": b"model: m\ndata: d\n"}
    for name, content in missing.items():
        yield BadFile(f"yaml: no {name}", yaml_file(content), (name,))
    yield BadFile("yaml: empty", yaml_file(b""), ("model",))
    yield BadFile("yaml: no such file", lambda f, m: ["train", str(f / "run.yaml")], ("run.yaml",))
