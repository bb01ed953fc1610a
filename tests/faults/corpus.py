"""Bad files, built in code: each with the command that meets it and the words that its message must have.

A case names the file, and the place in it where there is one. Nothing here is stored; `build` writes it.
"""

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Build = Callable[[Path, Path], list[str]]  # (a fresh folder, the good model's folder) -> arguments of `nybble`
GOOD = b'{"prompt": "What is %d?", "completion": "It is %d."}\n'
GOOD_ROWS = b"".join(GOOD % (n, n) for n in range(30))
MEGABYTES_10 = 10_000_000


@dataclass(frozen=True)
class BadFile:
    """Args:
    says: what the message must contain, file and place first.
    """

    name: str
    build: Build
    says: tuple[str, ...]


# ---- examples


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
    "missing completion": b'{"prompt": "a"}',
    "null completion": b'{"prompt": "a", "completion": null}',
    "number completion": b'{"prompt": "a", "completion": 4}',
    "list completion": b'{"prompt": "a", "completion": ["b"]}',
    "object completion": b'{"prompt": "a", "completion": {"text": "b"}}',
    "true prompt": b'{"prompt": true, "completion": "b"}',
    "infinite prompt": b'{"prompt": 1e999, "completion": "b"}',
    "endless number": b'{"prompt": ' + b"9" * 10_000 + b', "completion": "b"}',
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "deep and closed": b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b', "completion": "b"}',
    "two objects": b'{"prompt": "a", "completion": "b"} {"prompt": "a", "completion": "b"}',
    "bad escape": b'{"prompt": "\\x41", "completion": "b"}',
    "half an escape": b'{"prompt": "\\u12", "completion": "b"}',
    "binary": bytes(range(1, 256)).replace(b"\n", b"").replace(b"\r", b""),
    "empty object": b"{}",
}
BAD_MESSAGES = {
    "unknown role": message_row(USER, {"role": "wizard", "content": "b"}),
    "no role": message_row(USER, {"content": "b"}),
    "list as a role": message_row(USER, {"role": ["assistant"], "content": "b"}),
    "no content": message_row(USER, {"role": "assistant"}),
    "null content": message_row(USER, {"role": "assistant", "content": None}),
    "number content": message_row(USER, {"role": "assistant", "content": 3}),
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


def data_cases() -> Iterator[BadFile]:
    for name, line in BAD_LINES.items():
        for number in (1, 5):
            content = (GOOD * (number - 1)) % ((0,) * 2 * (number - 1)) + line + b"\n" + GOOD_ROWS
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
        "UTF-16": (GOOD_ROWS.decode().encode("utf-16"), "r.jsonl:1"),
        "UTF-32": (GOOD_ROWS.decode().encode("utf-32"), "r.jsonl:1"),
        "gzip": (b"\x1f\x8b\x08\x00" + bytes(64), "r.jsonl:1"),
        "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(64), "r.jsonl:1"),
        "pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x8c\x05posix\x94", "r.jsonl:1"),
        "10 MB without an end": (b"x" * MEGABYTES_10, "r.jsonl:1"),
        "10 MB of brackets": (b"[" * MEGABYTES_10, "r.jsonl:1"),
        "10 MB of NULs": (bytes(MEGABYTES_10), "r.jsonl:1"),
        "10 MB of quotes": (b'"' * MEGABYTES_10, "r.jsonl:1"),
        "10 MB row": (GOOD_ROWS + b'{"prompt": "a", "completion": "' + b"b" * MEGABYTES_10 + b'"}\n', "r.jsonl:31"),
        "10 MB prompt of words": (
            GOOD_ROWS + b'{"prompt": "' + b"a " * 5_000_000 + b'", "completion": "b"}',
            "r.jsonl:31",
        ),
        "10 MB of a character of 4 bytes": (
            GOOD_ROWS + b'{"prompt": "a", "completion": "' + "\U0001f600".encode() * 2_500_000 + b'"}',
            "r.jsonl:31",
        ),
        "10 MB of keys": (
            b"{" + b",".join(b'"k%d": 0' % n for n in range(700_000)) + b"}",
            "r.jsonl:1",
        ),
        "100,000 empty objects": (b"{}\n" * 100_000, "r.jsonl:1"),
        "unknown columns": (b'{"frage": "a", "antwort": "b"}\n', "r.jsonl:1"),
        "surrogate as a column": (b'{"\\ud800": "a"}\n', "r.jsonl:1"),
        "terminal escape as a column": (b'{"\\u001b[2J\\u001b]0;x\\u0007": "a"}\n', "r.jsonl:1"),
        "byte order mark before a bad row": (b'\xef\xbb\xbf{"prompt": "a"}\n', "r.jsonl:1"),
        "CRLF": (GOOD_ROWS.replace(b"\n", b"\r\n") + b'{"prompt": "a"}\r\n', "r.jsonl:31"),
        "all answers empty": (b'{"prompt": "a", "completion": " "}\n' * 20, "r.jsonl:1"),
    }
    for name, (content, place) in whole.items():
        yield BadFile(f"jsonl: {name}", data_file("r.jsonl", content), (place,))
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
        "UTF-16": (json.dumps(rows).encode("utf-16"), "r.json"),
        "endless number": (b"[" + b"9" * 10_000 + b"]", "r.json"),
        "empty": (b"", "r.json"),
        "Infinity": (b"-Infinity", "r.json"),
        "lone surrogate": (b'[{"prompt": "\\udfff", "completion": "b"}]', "r.json:1"),
        "10 MB of one object": (b'{"a": "' + b"x" * MEGABYTES_10, "r.json"),
    }
    for name, (content, place) in documents.items():
        yield BadFile(f"json: {name}", data_file("r.json", content), (place,))
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
        "UTF-16": ("prompt,completion\na,b\n".encode("utf-16"), "r.csv"),
        "10 MB cell": (b"prompt,completion\na," + b"x" * MEGABYTES_10 + b"\n", "r.csv:2"),
        "10 MB of commas": (b"," * MEGABYTES_10, "r.csv:1"),
    }
    for name, (content, place) in tables.items():
        yield BadFile(f"csv: {name}", data_file("r.csv", content), (place,))
    parquet = {
        "empty": b"",
        "text": GOOD_ROWS,
        "magic alone": b"PAR1PAR1",
        "endless footer": b"PAR1" + bytes(32) + struct.pack("<I", 2**32 - 1) + b"PAR1",
        "garbage footer": b"PAR1" + b"\xff" * 64 + struct.pack("<I", 64) + b"PAR1",
        "truncated": b"PAR1" + bytes(1000),
    }
    for name, content in parquet.items():
        yield BadFile(f"parquet: {name}", data_file("r.parquet", content), ("r.parquet",))
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
        "deep lists": REQUIRED + b"rank: " + b"[" * 20_000,
        "deep objects": REQUIRED + b"rank: " + b"{a: " * 20_000,
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
        "20,000 keys": REQUIRED + b"".join(b"k%d: 1\n" % n for n in range(20_000)),
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


# ---- model folders


def copied_model(folder: Path, model: Path) -> Path:
    target = folder / "model"
    shutil.copytree(model, target)
    return target


def model_folder(change: Callable[[Path], None], verb: str = "quantize") -> Build:
    """A copy of the good model, changed; met by `quantize`, which reads every tensor, or by `data check`."""

    def build(folder: Path, model: Path) -> list[str]:
        target = copied_model(folder, model)
        change(target)
        if verb == "quantize":
            return ["quantize", "--model", str(target), "--out", str(folder / "out")]
        (folder / "r.jsonl").write_bytes(GOOD_ROWS)
        return ["data", "check", "--model", str(target), "--data", str(folder / "r.jsonl")]

    return build


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def edit_header(edit: Callable[[dict[str, Any], str], Any]) -> Callable[[Path], None]:
    """Rewrite the first shard's header; `edit` changes the dict in place, or gives what is to stand there instead."""

    def change(model: Path) -> None:
        path = shards(model)[0]
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        name = next(name for name in header if name != "__metadata__")
        changed = edit(header, name)
        text = changed if isinstance(changed, bytes) else json.dumps(header if changed is None else changed).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])

    return change


def put(key: str, value: Any) -> Callable[[Path], None]:
    return edit_header(lambda header, name: header[name].__setitem__(key, value))


def resized(length: Callable[[int], int]) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = shards(model)[0]
        with path.open("r+b") as stream:
            stream.truncate(length(path.stat().st_size))

    return change


def header_length(value: int) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        with shards(model)[0].open("r+b") as stream:
            stream.write(value.to_bytes(8, "little"))

    return change


def put_values(pattern: bytes) -> Callable[[Path], None]:
    """Overwrite values in the middle of the first shard's data."""

    def change(model: Path) -> None:
        path = shards(model)[0]
        with path.open("r+b") as stream:
            stream.seek(path.stat().st_size - 64)
            stream.write(pattern)

    return change


def put_json(file: str, **changes: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        content = json.loads((model / file).read_text()) if (model / file).exists() else {}
        (model / file).write_text(json.dumps(content | changes))

    return change


def put_bytes(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda model: (model / file).write_bytes(content) and None


def put_weight_map(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        index = model / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        changed = edit(content["weight_map"])
        if changed is not None:
            content["weight_map"] = changed
        index.write_text(json.dumps(content))

    return change


def repoint(target: str) -> Callable[[Path], None]:
    return put_weight_map(lambda weights: weights.__setitem__(next(iter(weights)), target))


def only_pickle(model: Path) -> None:
    for path in (*shards(model), model / "model.safetensors.index.json"):
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


def safetensors_cases() -> Iterator[BadFile]:
    first = "model-00001-of"
    for length in (0, 1, 7, 8, 9, 100):
        yield BadFile(f"safetensors: cut to {length} bytes", model_folder(resized(lambda size, n=length: n)), (first,))
    for name, length in {
        "half": lambda n: n // 2,
        "the last byte gone": lambda n: n - 1,
        "longer": lambda n: n + 9,
    }.items():
        yield BadFile(f"safetensors: {name}", model_folder(resized(length)), (first,))
    for value in (0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001):
        yield BadFile(f"safetensors: header of {value}", model_folder(header_length(value)), (first,))
    headers = {
        "not JSON": b"{",
        "list": b"[]",
        "null": b"null",
        "number": b"7",
        "text": b'"x"',
        "NULs": bytes(64),
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "not UTF-8": b'{"\xff": 1}',
        "deep": b"[" * 100_000,
        "empty object": b"{}",
        "NaN": b'{"a": NaN}',
        "duplicate": b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "a": {}}',
        "entry is null": b'{"a": null}',
        "entry is a list": b'{"a": []}',
    }
    for name, text in headers.items():
        build = model_folder(edit_header(lambda header, key, text=text: text))
        yield BadFile(f"safetensors header: {name}", build, (first,))
    values: dict[str, list[Any]] = {
        "dtype": ["F33", "", None, 3, ["F32"], {"a": 1}, "U64"],
        "shape": [[-1], [1.5], "64", None, [2**62, 2**62], [True], [[64]], {"a": 1}, [0]],
        "data_offsets": [[4, 0], [-4, 0], [0], [0, 1, 2], "ab", None, [0, 2**63], [1.0, 2.0], [0, 3], [2**70, 2**71]],
    }
    for key, bad in values.items():
        for value in bad:
            yield BadFile(f"safetensors entry: {key} {value!r}", model_folder(put(key, value)), (first,))
        without = edit_header(lambda header, name, key=key: header[name].pop(key) and None)
        yield BadFile(f"safetensors entry: no {key}", model_folder(without), (first,))

    def rename(new: str) -> Callable[[Path], None]:
        return edit_header(lambda header, name: header.__setitem__(new, header.pop(name)))

    for new in ("", "unknown", "\ud800", "\x1b[2J", "../../etc/passwd"):
        yield BadFile(f"safetensors: tensor called {new!r}", model_folder(rename(new)), ("model",))
    nan, infinity = struct.pack("<f", float("nan")), struct.pack("<f", float("inf"))
    yield BadFile("safetensors: NaN", model_folder(put_values(nan * 4)), ("not finite",))
    yield BadFile("safetensors: infinity", model_folder(put_values(infinity)), ("not finite",))
    yield BadFile(
        "safetensors: minus infinity", model_folder(put_values(struct.pack("<f", float("-inf")))), ("not finite",)
    )
    index = "model.safetensors.index.json"
    for target in (
        "../x.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        ".",
        "",
        "a\\b",
        "a\0b",
        "\ud800",
        "nowhere",
    ):
        yield BadFile(f"shard map: {target!r}", model_folder(repoint(target)), (index,))
    maps: dict[str, Any] = {"a list": [], "empty": {}, "a number": 4, "numbers": {"a": 1}, "null": None}
    for name, value in maps.items():
        build = model_folder(put_json(index, weight_map=value))
        yield BadFile(f"shard map: {name}", build, ("model",))
    texts = {"not JSON": b"{", "NUL": b"\0", "deep": b"[" * 100_000, "list": b"[]", "UTF-16": "{}".encode("utf-16")}
    texts["duplicate key"] = b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "a": "b"}}'
    for name, text in texts.items():
        yield BadFile(f"shard map: {name}", model_folder(put_bytes(index, text)), (index,))
    yield BadFile("model: a pickle", model_folder(only_pickle), ("pytorch_model.bin", "pickle"))
    yield BadFile("model: a shard is missing", model_folder(lambda m: shards(m)[0].unlink()), (first,))
    yield BadFile("model: a link out of the folder that leads nowhere", model_folder(dangling), (first,))


def dangling(model: Path) -> None:
    shards(model)[0].unlink()
    (model / shards(model)[0].name.replace("00002", "00001", 1)).symlink_to("/nowhere")


def config_cases() -> Iterator[BadFile]:
    texts = {
        "not JSON": b"{",
        "empty": b"",
        "list": b"[]",
        "null": b"null",
        "NUL": b"{\0}",
        "not UTF-8": b'{"model_type": "\xff"}',
        "deep": b"[" * 100_000,
        "no model_type": b"{}",
        "duplicate key": b'{"model_type": "llama", "model_type": "bert"}',
        "endless number": b'{"model_type": "llama", "hidden_size": ' + b"9" * 10_000 + b"}",
    }
    for name, text in texts.items():
        yield BadFile(f"config.json: {name}", model_folder(put_bytes("config.json", text)), ("config.json",))
    values: dict[str, list[Any]] = {
        "model_type": ["nothing", "", None, 3, ["llama"], "bert", "../llama"],
        "hidden_size": [0, -64, "64", 1.5, None, 10**12, 65, [64]],
        "intermediate_size": [0, -1, 10**12, "x"],
        "num_hidden_layers": [10**9, -1, 0, 3, "2", None, 2.5],
        "num_attention_heads": [0, -4, 3, 10**9, "4"],
        "num_key_value_heads": [0, 3, 10**9],
        "head_dim": [0, -1, 10**9, "x"],
        "vocab_size": [0, -1, 10, 10**12, "x"],
        "hidden_act": ["nothing", 3],
        "quantization_config": [
            {"quant_method": "gptq"},
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            [],
            "x",
            3,
        ],
        "rms_norm_eps": ["x"],
    }
    for key, bad in values.items():
        for value in bad:
            yield BadFile(
                f"config.json: {key} {value!r:.60}", model_folder(put_json("config.json", **{key: value})), ("model",)
            )


def tokenizer_cases() -> Iterator[BadFile]:
    def changed(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
        def change(model: Path) -> None:
            content = json.loads((model / "tokenizer.json").read_text())
            edit(content)
            (model / "tokenizer.json").write_text(json.dumps(content))

        return change

    def cut(length: int) -> Callable[[Path], None]:
        def change(model: Path) -> None:
            content = (model / "tokenizer.json").read_bytes()
            (model / "tokenizer.json").write_bytes(content[:length])

        return change

    for length in (0, 1, 100, 2000, 3000):
        yield BadFile(f"tokenizer: cut to {length}", model_folder(cut(length), "data"), ("model",))
    texts = {
        "empty object": b"{}",
        "list": b"[]",
        "NULs": bytes(99),
        "deep": b"[" * 50_000,
        "not UTF-8": b'{"\xff": 1}',
    }
    for name, text in texts.items():
        yield BadFile(f"tokenizer: {name}", model_folder(put_bytes("tokenizer.json", text), "data"), ("model",))
    edits: dict[str, Callable[[dict[str, Any]], Any]] = {
        "no model": lambda t: t.pop("model"),
        "unknown model": lambda t: t["model"].__setitem__("type", "Nothing"),
        "vocabulary is a list": lambda t: t["model"].__setitem__("vocab", []),
        "vocabulary of texts": lambda t: t["model"].__setitem__("vocab", {"a": "b"}),
        "negative ids": lambda t: t["model"].__setitem__("vocab", {"a": -1}),
        "ids beyond 32 bits": lambda t: t["model"].__setitem__("vocab", {"a": 2**40}),
        "merges of unknown tokens": lambda t: t["model"].__setitem__("merges", [["q!", "z!"]]),
        "pre-tokenizer unknown": lambda t: t.__setitem__("pre_tokenizer", {"type": "Nothing"}),
        "bad pattern": lambda t: t.__setitem__(
            "pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(["}, "behavior": "Isolated", "invert": False}
        ),
        "version": lambda t: t.__setitem__("version", 7),
    }
    for name, edit in edits.items():
        yield BadFile(f"tokenizer: {name}", model_folder(changed(edit), "data"), ("model",))

    def shift(t: dict[str, Any]) -> None:
        """Ids beyond the model's embedding, for every token."""
        t["model"]["vocab"] = {token: number + 5000 for token, number in t["model"]["vocab"].items()}
        for token in t["added_tokens"]:
            token["id"] += 5000

    yield BadFile(
        "tokenizer: ids beyond the vocabulary", model_folder(changed(shift), "data"), ("r.jsonl:1", "embedding")
    )
    settings = "tokenizer_config.json"
    for name, text in {"not JSON": b"{", "list": b"[]", "NUL": b"\0"}.items():
        yield BadFile(f"tokenizer_config: {name}", model_folder(put_bytes(settings, text), "data"), ("model",))
    without = model_folder(lambda m: [(m / f).unlink() for f in ("tokenizer.json", settings)] and None, "data")
    yield BadFile("tokenizer: none", without, ("model",))
    templates = {
        "syntax": "{% for m in messages %}",
        "unknown tag": "{% include '/etc/passwd' %}",
        "endless loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "endless loop over content": "{% for m in messages %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "x{% endfor %}{% endfor %}{% endfor %}",
        "huge string": "{{ 'a' * 3000000000 }}",
        "doubled string": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "huge power": "{{ 9 ** 9 ** 9 }}",
        "huge power at run time": "{% set n = messages | length + 7 %}{{ n ** n ** n }}",
        "huge list": "{{ [0] * 3000000000 }}",
        "huge padding": "{{ 'a'.center(3000000000) }}",
        "raise": "{{ raise_exception('no') }}",
        "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "globals": "{{ raise_exception.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
        "format string": "{{ '{0.__class__.__mro__}'.format(messages) + messages[0].nothing.nothing }}",
        "type error": "{{ 1 + 'a' }}",
        "division by zero": "{{ 1 / 0 }}",
        "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "changes its input": "{{ messages.append(1) }}",
        "loses content": "{% for m in messages %}{{ m.role }}{% endfor %}",
        "nothing": " ",
        "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    }
    for name, text in templates.items():
        build = model_folder(put_bytes("chat_template.jinja", text.encode()), "data")
        yield BadFile(f"template: {name}", build, ("template",))


# ---- GGUF

U32, STRING, ARRAY = 4, 8, 9


def gguf_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf_pair(key: bytes, kind: int, value: bytes) -> bytes:
    return gguf_string(key) + struct.pack("<I", kind) + value


def gguf_tensor(name: bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    shape = b"".join(struct.pack("<Q", size) for size in dims)
    return gguf_string(name) + struct.pack("<I", len(dims)) + shape + struct.pack("<IQ", kind, offset)


LLAMA = gguf_pair(b"general.architecture", STRING, gguf_string(b"llama"))


def gguf_bytes(pairs: list[bytes], tensors: list[bytes], **other: Any) -> bytes:
    """A GGUF file with 4 KiB of data; `other` puts false counts, version or magic."""
    counts = struct.pack("<QQ", other.get("num_tensors", len(tensors)), other.get("num_pairs", len(pairs)))
    head = other.get("magic", b"GGUF") + struct.pack("<I", other.get("version", 3)) + counts
    head += b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(4096)


def gguf_file(content: bytes) -> Build:
    def build(folder: Path, model: Path) -> list[str]:
        (folder / "m.gguf").write_bytes(content)
        return ["quantize", "--model", str(folder / "m.gguf"), "--out", str(folder / "out")]

    return build


def gguf_cases() -> Iterator[BadFile]:
    tensor = gguf_tensor(b"token_embd.weight", [32, 4])
    good = gguf_bytes([LLAMA], [tensor])
    contents = {
        f"cut to {length}": good[:length] for length in (0, 1, 4, 8, 16, 24, 30, 60, 100, 120, len(good) - 4096)
    }

    def with_pair(kind: int, value: bytes, key: bytes = b"x") -> bytes:
        return gguf_bytes([LLAMA, gguf_pair(key, kind, value)], [tensor])

    def with_tensor(*args: Any) -> bytes:
        return gguf_bytes([LLAMA], [gguf_tensor(*args)])

    contents |= {
        "magic": gguf_bytes([LLAMA], [tensor], magic=b"GGML"),
        "big-endian": gguf_bytes([LLAMA], [tensor], version=3 << 24),
        "version 1": gguf_bytes([LLAMA], [tensor], version=1),
        "version 99": gguf_bytes([LLAMA], [tensor], version=99),
        "endless pairs": gguf_bytes([LLAMA], [tensor], num_pairs=2**63),
        "endless tensors": gguf_bytes([LLAMA], [tensor], num_tensors=2**63),
        "one pair too many": gguf_bytes([LLAMA], [tensor], num_pairs=2),
        "one tensor too many": gguf_bytes([LLAMA], [tensor], num_tensors=2),
        "endless key": gguf_bytes([struct.pack("<Q", 2**63)], [tensor]),
        "endless string": with_pair(STRING, struct.pack("<Q", 2**62)),
        "endless array": with_pair(ARRAY, struct.pack("<IQ", U32, 2**60)),
        "endless array of strings": with_pair(ARRAY, struct.pack("<IQ", STRING, 2**60)),
        "array of arrays": with_pair(ARRAY, struct.pack("<IQ", ARRAY, 4)),
        "array of nothing": with_pair(ARRAY, struct.pack("<IQ", 77, 4)),
        "unknown type": with_pair(77, bytes(8)),
        "key twice": gguf_bytes([LLAMA, LLAMA], [tensor]),
        "key not UTF-8": with_pair(U32, bytes(4), b"\xff\xfe"),
        "string not UTF-8": with_pair(STRING, gguf_string(b"\xed\xa0\x80")),
        "no architecture": gguf_bytes([], [tensor]),
        "unknown architecture": gguf_bytes(
            [gguf_pair(b"general.architecture", STRING, gguf_string(b"\x1b[2J"))], [tensor]
        ),
        "number as architecture": gguf_bytes([gguf_pair(b"general.architecture", U32, bytes(4))], [tensor]),
        "one of many parts": with_pair(U32, struct.pack("<I", 7), b"split.count"),
        "text as parts": with_pair(STRING, gguf_string(b"7"), b"split.count"),
        "alignment 0": with_pair(U32, bytes(4), b"general.alignment"),
        "alignment of a text": with_pair(STRING, gguf_string(b"32"), b"general.alignment"),
        "alignment beyond the file": with_pair(U32, struct.pack("<I", 2**31), b"general.alignment"),
        "endless layers": with_pair(U32, struct.pack("<I", 2**32 - 1), b"llama.block_count"),
        "layers of a text": with_pair(STRING, gguf_string(b"2"), b"llama.block_count"),
        "no dimensions": with_tensor(b"a", []),
        "nine dimensions": with_tensor(b"a", [1] * 9),
        "no rows": with_tensor(b"a", [32, 0]),
        "endless rows": with_tensor(b"a", [32, 2**62]),
        "endless everything": with_tensor(b"a", [2**63, 2**63]),
        "unknown tensor type": with_tensor(b"a", [32, 4], 999),
        "tensor type that cannot be read": with_tensor(b"a", [32, 4], 24),
        "odd rows of blocks": with_tensor(b"a", [33, 4], 2),
        "offset beyond the file": with_tensor(b"a", [32, 4], 0, 2**40),
        "offset beyond 64 bits": with_tensor(b"a", [32, 4], 0, 2**64 - 1),
        "tensor twice": gguf_bytes([LLAMA], [tensor, tensor]),
        "no tensors": gguf_bytes([LLAMA], []),
        "no metadata": good,
        "unknown tensor": with_tensor(b"../../x\0", [32, 4]),
        "10 MB of NULs": b"GGUF" + struct.pack("<IQQ", 3, 10**6, 10**6) + bytes(MEGABYTES_10),
    }
    for name, content in contents.items():
        yield BadFile(f"gguf: {name}", gguf_file(content), ("m.gguf",))


# ---- runs and their adapters

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def safetensors_bytes(tensors: dict[str, list[int]]) -> bytes:
    """fp32 zeros under these names, in these shapes."""
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


def run_folder(file: str, content: bytes | None) -> Build:
    """A run with a small adapter, of which one file is replaced or taken away; met by `chat`."""

    def build(folder: Path, model: Path) -> list[str]:
        adapter = folder / "run" / "adapter"
        adapter.mkdir(parents=True)
        (folder / "run" / "config.yaml").write_text(f"model: {model}\ndata: d\nout: {folder / 'run'}\n")
        (adapter / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
        (adapter / "adapter_model.safetensors").write_bytes(safetensors_bytes(ADAPTER))
        if content is None:
            (folder / "run" / file).unlink()
        else:
            (folder / "run" / file).write_bytes(content)
        return ["chat", "--run", str(folder / "run"), "--prompt", "a", "--max-new-tokens", "1"]

    return build


ADAPTER = {f"{LAYER}.lora_A.weight": [2, 64], f"{LAYER}.lora_B.weight": [64, 2]}


def run_cases() -> Iterator[BadFile]:
    config, weights = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
    for file in ("config.yaml", config, weights):
        yield BadFile(f"run: no {file}", run_folder(file, None), ("run",))
        yield BadFile(f"run: empty {file}", run_folder(file, b""), ("run" if file == weights else "",))
        yield BadFile(f"run: NULs for {file}", run_folder(file, bytes(64)), ("run",))
    texts = [
        "[]",
        "3",
        "{}",
        '{"r": "2", "lora_alpha": 4}',
        '{"r": 0, "lora_alpha": 4}',
        '{"r": 1000000000, "lora_alpha": 4}',
    ]
    texts += [
        '{"r": 2}',
        '{"r": 2, "lora_alpha": null}',
        '{"r": 2, "lora_alpha": "x"}',
        '{"r": -2, "lora_alpha": 4}',
        "[" * 50_000,
    ]
    for text in texts:
        yield BadFile(f"adapter_config: {text:.40}", run_folder(config, text.encode()), ("adapter",))
    a, b = ADAPTER
    shapes: dict[str, dict[str, list[int]]] = {
        "A alone": {a: [2, 64]},
        "B alone": {b: [64, 2]},
        "wrong width": {a: [2, 63], b: [64, 2]},
        "wrong rank": {a: [3, 64], b: [64, 3]},
        "no rows": {a: [0, 64], b: [64, 0]},
        "a vector": {a: [128], b: [64, 2]},
        "unknown layer": {a.replace("q_proj", "z_proj"): [2, 64], b.replace("q_proj", "z_proj"): [64, 2]},
        "nothing": {},
    }
    for name, tensors in shapes.items():
        yield BadFile(f"adapter: {name}", run_folder(weights, safetensors_bytes(tensors)), ("adapter",))


def all_cases() -> list[BadFile]:
    groups = (data_cases, yaml_cases, safetensors_cases, config_cases, tokenizer_cases, gguf_cases, run_cases)
    cases = [case for group in groups for case in group()]
    assert len({case.name for case in cases}) == len(cases), "names are unique"
    return cases
