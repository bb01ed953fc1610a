"""How a run's four bits are chosen, and what a run with a calibrated base keeps."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, LlamaConfig

from nybble.errors import DataError, FormatError, ModelError, PlanError
from nybble.events import Event, Progress
from nybble.formats.blockwise import block_scales
from nybble.formats.quant_spec import QuantSpec
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.options.groups import MachineOptions
from nybble.options.verbs import load_config
from nybble.planning.calibration_costs import (
    AROUND_BYTES,
    calibration_bytes,
    calibration_products,
    training_products,
)
from nybble.planning.shape import shape_of
from nybble.quantization.walk import WalkError
from nybble.runs import base
from nybble.runs.folder import RunFolder
from nybble.runs.open_run import load_run
from nybble.sources.skeleton import build_skeleton
from nybble.training import session

LLAMA = shape_of(
    build_skeleton(
        LlamaConfig(
            num_hidden_layers=2,
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=128,
            vocab_size=259,
        )
    )
)


def train(tiny_model: Path, data: Path, out: Path, **options: object):
    given = {"model": str(tiny_model), "data": str(data), "out": str(out), "max_steps": 2, "rows_per_step": 4}
    return session.train(load_config(None, given | {"compute_dtype": "fp32"} | options))


def bits(model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: (m.packed, m.scales) for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def scales(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([block_scales(m.quantized()) for m in model.modules() if isinstance(m, QuantizedLinear)])


def assert_same_bits(first: torch.nn.Module, second: torch.nn.Module) -> None:
    ours, theirs = bits(first), bits(second)
    assert len(ours) == 14 and ours.keys() == theirs.keys()
    for name, (packed, scales) in ours.items():
        assert torch.equal(packed, theirs[name][0]) and torch.equal(scales, theirs[name][1]), name


def planned(out: Path) -> dict[str, str]:
    return json.loads((out / "plan.json").read_text())["chosen"]["rounding"]


def test_products_are_counted_as_the_formulas_say() -> None:
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    assert training_products(LLAMA, 10, 3) == 2 * weights * 10 + 2 * 259 * 64 * 3
    gram = 2 * (64 * 64 * 3 + 128 * 128)
    by_weight = 2 * (64 * 64 * 64 * 2 + 64 * 64 * 32 * 2 + 64 * 64 * 128 * 2 + 128 * 128 * 64)
    expected = 7 * (3 * weights + gram * 0.6) + 5 * by_weight
    assert calibration_products(LLAMA, 7, 4) == pytest.approx(expected)
    assert calibration_products(LLAMA, 7, 2) > expected


def test_auto_takes_absmax_where_calibrating_would_take_long_and_says_so(tiny_model: Path, data: Path, tmp_path: Path):
    trained = train(tiny_model, data, tmp_path / "run")
    rounding = planned(tmp_path / "run")
    assert rounding["rounding"] == "absmax" and "of the training's time" in rounding["why"]
    assert not (tmp_path / "run" / "base").exists()
    layers = [module for module in trained.model.modules() if isinstance(module, QuantizedLinear)]
    assert layers and all((block_scales(layer.quantized()) >= 0).all() for layer in layers)  # searched ones have signs
    assert_same_bits(trained.model, load_run(tmp_path / "run", MachineOptions(compute_dtype="fp32")).model)


def test_auto_calibrates_where_that_is_a_small_part(tiny_model: Path, data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(base, "AFFORDABLE", 1e9)
    train(tiny_model, data, tmp_path / "run", calibration_tokens=2048)
    assert planned(tmp_path / "run")["rounding"] == "calibrated"


def test_calibration_that_takes_more_than_the_budget(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """It is left out where the plan may choose, refused where it is asked for, before anything is written."""
    options = {"calibration_tokens": 50_000_000, "memory": "8GB"}  # their states alone take 10 GB in 16 bits
    with pytest.raises(PlanError, match=r"Calibrating .* takes about .* GB; the budget is 8 GB"):
        train(tiny_model, data, tmp_path / "run", quality="calibrated", **options)
    assert not list(tmp_path.glob("*run*"))
    train(tiny_model, data, tmp_path / "run", **options)
    rounding = planned(tmp_path / "run")
    assert rounding["rounding"] == "absmax" and "calibrating would take about" in rounding["why"]


def test_bytes_of_calibrating_are_those_of_its_largest_group() -> None:
    """By hand, for 10 tokens: the largest is down_proj, with its inputs and its drift."""
    spec = QuantSpec()
    elements = 64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3
    packed = 2 * spec.bytes(64 * 64) + 2 * spec.bytes(64 * 32) + 3 * spec.bytes(64 * 128)
    always = 2 * (elements + 64 * 128) + packed + 15 * 2 * 64
    chunk = 10 * (128 * (4 + 3 * 2) + 2 * 2 * 128)
    group = 15 * 2 * 128 + 4 * 128 * (128 + 64) + max(chunk, 2 * 4 * 128 * 64)
    assert calibration_bytes(LLAMA, spec, 10, 2) == always + group + AROUND_BYTES


def test_a_calibrated_run_keeps_its_base_and_loads_it(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    options = {"quality": "calibrated", "calibration_tokens": 2048}
    trained = train(tiny_model, data, tmp_path / "run", **options)
    assert planned(tmp_path / "run") == {"rounding": "calibrated", "why": "as asked", "asked": True}
    data.unlink()  # nothing is calibrated again
    assert_same_bits(trained.model, load_run(tmp_path / "run", MachineOptions(compute_dtype="fp32")).model)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    shutil.move(tmp_path / "run", tmp_path / "moved")
    weights = tmp_path / "moved" / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(FormatError, match="SHA-256"):
        load_run(tmp_path / "moved", MachineOptions())


def test_the_same_seed_gives_the_same_base(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    options = {"quality": "calibrated", "calibration_tokens": 2048}
    first, second = (train(tiny_model, data, tmp_path / name, **options) for name in ("a", "b"))
    assert_same_bits(first.model, second.model)
    other = train(tiny_model, data, tmp_path / "c", **options, seed=1)
    with pytest.raises(AssertionError):
        assert_same_bits(first.model, other.model)


def test_what_cannot_be_calibrated_is_refused_where_that_was_asked_for(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch
) -> None:
    """nybble's own choice gives way and says why; the user's does not."""

    def refuse(*arguments: object) -> None:
        raise WalkError("its layers are a maze")

    monkeypatch.setattr("nybble.quantization.blocks.start_walk", refuse)
    monkeypatch.setattr(base, "AFFORDABLE", 1e9)
    asked = [{"quality": "calibrated"}, {"calibrate": str(data.with_name("text.txt"))}]
    data.with_name("text.txt").write_text("Something long enough to calibrate on. " * 200)
    for options in asked:
        with pytest.raises(WalkError, match=r"(?s)its layers are a maze.*--quality absmax"):
            train(tiny_model, data, tmp_path / "run", calibration_tokens=2048, **options)
        assert not list(tmp_path.glob("*run*"))
    train(tiny_model, data, tmp_path / "run", calibration_tokens=2048)
    rounding = planned(tmp_path / "run")
    assert rounding["rounding"] == "absmax" and "cannot be calibrated: its layers are a maze" in rounding["why"]


def test_a_resumed_run_goes_on_with_its_base(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    options = {"quality": "calibrated", "calibration_tokens": 2048, "save_every": "1"}
    whole = train(tiny_model, data, tmp_path / "whole", **options)
    train(tiny_model, data, tmp_path / "run", **options)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-2")
    resumed = train(tiny_model, data, tmp_path / "run", **options, resume=True)
    assert_same_bits(whole.model, resumed.model)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "whole" / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def test_an_earlier_run_is_untouched_until_training_begins(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    train(tiny_model, data, tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(DataError, match=r"short\.txt: 10 tokens"):
        train(tiny_model, data, tmp_path / "run", overwrite=True, calibrate=str(short))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_run_can_be_watched_from_its_first_second(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """In a place of its own, while an earlier run is as it was; what was told there then lies in the run's log."""
    train(tiny_model, data, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    before, seen = {path.name: path.stat().st_mtime_ns for path in run.path.iterdir()}, list[str]()

    def kinds(log: Path) -> list[str]:
        return list(dict.fromkeys(json.loads(line)["event"] for line in log.read_text().splitlines()))

    def watch(event: Event) -> None:
        if isinstance(event, Progress) and event.what == "loading" and not seen:
            seen.extend(kinds(run.starting.events))
            after = {path.name: path.stat().st_mtime_ns for path in run.path.iterdir()}
            assert after.pop(run.starting.path.name) and after == before

    again = {"model": str(tiny_model), "data": str(data), "out": str(run.path), "max_steps": 1, "overwrite": True}
    session.train(load_config(None, again), watch)
    assert seen == ["start", "model", "audit", "rounding", "plan", "progress"]
    assert kinds(run.events) == [*seen, "note", "begin", "eval", "step", "end"]
    assert not run.starting.path.exists()


def test_a_model_that_is_refused_once_it_is_loaded_touches_no_earlier_run(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    train(tiny_model, data, tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    encoder = tmp_path / "encoder"
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertLMHeadModel(BertConfig(**shape, vocab_size=259, pad_token_id=0)).save_pretrained(encoder)
    for file in tiny_model.glob("*token*"):
        shutil.copy(file, encoder)
    with pytest.raises(ModelError, match="is no decoder"):
        train(encoder, data, tmp_path / "run", overwrite=True, quality="absmax", calibrate=None)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


def test_calibrating_on_the_validation_rows_stops_the_run(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"of the validation rows: .*rows\.jsonl:"):
        train(tiny_model, data, tmp_path / "run", calibrate=str(data))
    assert not (tmp_path / "run").exists()


def test_absmax_is_still_bitsandbytes(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    trained = train(tiny_model, data, tmp_path / "run", quality="absmax")
    assert all(
        (block_scales(m.quantized()) >= 0).all() for m in trained.model.modules() if isinstance(m, QuantizedLinear)
    )


def test_zero_points_keep_absmax(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    train(tiny_model, data, tmp_path / "run", format="int4_asym")
    assert planned(tmp_path / "run")["rounding"] == "absmax"
    with pytest.raises(FormatError, match="zero points"):
        train(tiny_model, data, tmp_path / "other", format="int4_asym", quality="search")
