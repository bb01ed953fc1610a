"""Runs whose files or adapters are bad."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from bad_file import BadFile, Build

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
