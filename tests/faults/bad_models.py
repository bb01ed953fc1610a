"""Bad model folders: weights, configs, tokenizers, templates."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bad_file import GOOD_ROWS, BadFile, Build


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
            {"quant_method": ["gptq"]},
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": "no"},
            {"quant_method": "awq", "bits": 4, "group_size": 64},
            {"quant_method": "fp8", "weight_block_size": [0, 128]},
            {"quant_method": "compressed-tensors", "config_groups": [], "format": "pack-quantized"},
            {"quant_method": "modelopt", "quant_algo": None},
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
