"""Training on from an adapter: it is what training begins with, and only on the base and the options it belongs to."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_models import adapted
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nybble.errors import ConfigError, RunError
from nybble.formats.quant_spec import BaseFormats
from nybble.options.verbs import load_config
from nybble.quantization.folder import quantize_folder
from nybble.runs.events import read_events
from nybble.sources.open import open_model
from nybble.training.session import train

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def start(tiny_model: Path, data: Path, tmp_path: Path) -> Callable[..., Path]:
    """Trains for some steps; returns the run folder."""

    def run(out: str, **more: Any) -> Path:
        options = {"model": str(tiny_model), "data": str(data), "out": str(tmp_path / out), "rows_per_step": 6}
        options |= {"compute_dtype": "fp32", "save_every": 1, "keep_checkpoints": 99, "lr": 5e-3, "max_steps": 3}
        train(load_config(None, options | more))
        return tmp_path / out

    return run


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / ADAPTER)


def evaluated(run: Path, step: int) -> float:
    return next(e["loss"] for e in read_events(run / "events.jsonl", "eval") if e["step"] == step)


def test_begins_where_the_adapter_was(start) -> None:
    first = start("first", rank=4, alpha=12.0, rslora=True, target_modules="attention", eval_every=3)
    second = start("second", adapter=str(first / "adapter"), lr=1e-30, max_steps=1, eval_every=1)
    for name, tensor in tensors(first).items():
        assert torch.equal(tensor, tensors(second)[name])
    assert evaluated(second, 0) == pytest.approx(evaluated(first, 3), abs=1e-6)
    assert evaluated(first, 0) != pytest.approx(evaluated(first, 3), abs=1e-3)
    config = load_config(second / "config.yaml", {})
    assert (config.adapters.rank, config.adapters.alpha, config.adapters.rslora) == (4, 12.0, True)
    (event,) = read_events(second / "events.jsonl", "adapter")
    assert event["path"] == str(first / "adapter")


def test_resumed_it_ends_with_the_same_bytes_without_the_first_adapter(start, tmp_path: Path) -> None:
    first = start("first", rank=4, target_modules="q_proj,lm_head,embed_tokens")
    second = start("second", adapter=str(first))
    whole = (second / ADAPTER).read_bytes()
    shutil.rmtree(first)
    for step in (2, 3):
        shutil.rmtree(second / "checkpoints" / f"step-{step}")
    train(load_config(second / "config.yaml", {"out": str(second), "resume": True}))
    assert (second / ADAPTER).read_bytes() == whole


def test_pefts_adapter_is_trained_on(start, tiny_model: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = peft.LoraConfig(r=5, lora_alpha=7, target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted(base, config).save_pretrained(tmp_path / "peft")
    run = start("run", adapter=str(tmp_path / "peft"), lr=1e-30, max_steps=1)
    before = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert tensors(run).keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(run).items())
    written = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["target_modules"]) == (5, 7, ["down_proj", "v_proj"])


@pytest.mark.parametrize(
    ("option", "value"),
    [("rank", 8), ("alpha", 16.0), ("rslora", True), ("target_modules", "q_proj"), ("rank_pattern", {"q_proj": 2})],
)
def test_an_option_that_differs_is_refused_by_name(make_run, data: Path, tmp_path: Path, option: str, value: Any):
    run = make_run()
    options = {"model": str(run.parent / "base"), "data": str(data), "out": str(tmp_path / "out"), "adapter": str(run)}
    with pytest.raises(ConfigError, match=option.replace("_", "-")):
        train(load_config(None, options | {option: value}))


def test_another_base_is_refused_and_its_four_bit_folder_is_not(start, tiny_model: Path, tmp_path: Path) -> None:
    first = start("first", max_steps=1)
    quantize_folder(open_model(str(tiny_model)), BaseFormats(), tmp_path / "four")
    start("on-four-bits", model=str(tmp_path / "four"), adapter=str(first), max_steps=1)
    shutil.copytree(tiny_model, tmp_path / "other")
    file = next((tmp_path / "other").glob("*.safetensors"))
    save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(RunError, match="another base"):
        start("refused", model=str(tmp_path / "other"), adapter=str(first), max_steps=1)
    start("insisted", model=str(tmp_path / "other"), adapter=str(first), max_steps=1, allow_change="base")


def test_an_adapter_and_a_way_to_begin_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loftq"):
        load_config(None, {"model": "m", "data": "d", "out": str(tmp_path), "adapter": "a", "init": "loftq"})
