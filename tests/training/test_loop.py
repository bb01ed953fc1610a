"""The training loop on a tiny model: what must not change the result, and what must stop it."""

import hashlib
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from processes import nybble
from transformers import BloomConfig, BloomForCausalLM

from nybble.errors import TrainingError
from nybble.formats.format import FORMATS
from nybble.layers.convert import adapters_of
from nybble.options.option import build_options
from nybble.options.verbs import TrainConfig
from nybble.runs.events import read_events
from nybble.runs.result import RunResult
from nybble.training import session
from nybble.training.events import Step
from nybble.training.session import train


def config(model: Path, data: Path, out: Path, **options: object) -> TrainConfig:
    settings = {
        "model": str(model),
        "data": str(data),
        "out": str(out),
        "max_steps": 3,
        "rows_per_step": 6,
        "rank": 4,
        "lr": 5e-3,
        "compute_dtype": "fp32",
    }
    return build_options(TrainConfig, settings | options)


def run(*args: Path, **options: object) -> RunResult:
    return train(config(*args, **options))


def losses(out: Path) -> list[float]:
    return [event["loss"] for event in read_events(out / "events.jsonl", "step")]


def adapter_digest(out: Path) -> str:
    return hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_micro_batches_packing_and_what_is_kept_do_not_change_the_losses(tiny_model, data, tmp_path):
    variants = {
        "whole step": {"micro_batch_size": 6, "keep": "everything"},
        "one row at a time": {"micro_batch_size": 1, "keep": "nothing"},
        "uneven": {"micro_batch_size": 4, "keep": "attention"},
        "padded, generic": {"micro_batch_size": 3, "packing": False, "keep": "everything"},
        "padded, recomputed": {"micro_batch_size": 3, "packing": False, "keep": "nothing"},
    }
    seen = {}
    for name, options in variants.items():
        out = tmp_path / name.replace(" ", "-")
        result = run(tiny_model, data, out, **options)
        seen[name] = [result.loss_before, *losses(out), result.loss_after]
    expected = seen["whole step"]
    assert expected[-1] < expected[0]
    for name, got in seen.items():
        assert got == pytest.approx(expected, rel=1e-4), name


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tiny_model, data, tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tiny_model, data, tmp_path / out, seed=seed)
    assert adapter_digest(tmp_path / "a") == adapter_digest(tmp_path / "b") != adapter_digest(tmp_path / "c")


def test_dropout_trains_on_the_generic_path(tiny_model, data, tmp_path):
    result = run(tiny_model, data, tmp_path / "run", dropout=0.1)
    assert result.loss_after < result.loss_before


def test_sixteen_bit_lora_and_every_format_train(tiny_model, data, tmp_path):
    for format in ("none", *FORMATS):
        result = run(tiny_model, data, tmp_path / format, format=format)
        assert result.loss_after < result.loss_before, format


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (9, [2, 4, 5])])
def test_checkpoints_are_saved_at_intervals_and_at_the_end_and_the_last_stay(keep, left, tiny_model, data, tmp_path):
    tmp_path /= "run"
    run(tiny_model, data, tmp_path, max_steps=5, save_every=2, keep_checkpoints=keep)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{step}" for step in left]
    final = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "checkpoints" / "step-5" / "adapter_model.safetensors").read_bytes() == final


def test_a_plan_of_memory_and_its_measurement_are_kept(tiny_model, data, tmp_path):
    tmp_path /= "run"
    run(tiny_model, data, tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["chosen"]["peak_bytes"] > 0 and plan["measured"]["peak_bytes"] > 0
    assert plan["chosen"]["components"]["base weights"] > 0
    assert plan["chosen"]["path"].startswith("decoder blocks") and plan["chosen"]["keep"] == "everything"


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_number_that_is_not_finite_stops_names_rows_and_keeps_the_adapter(
    what, tiny_model, data, tmp_path, monkeypatch
):
    """The second step meets a base weight of infinity, or a gradient of NaN, and must not reach the optimizer."""
    good = tmp_path / "good"
    run(tiny_model, data, good, max_steps=1, schedule="constant", warmup=0, micro_batch_size=2)

    def spoil(model: torch.nn.Module) -> None:
        if what == "loss":
            model.base_model.norm.weight.data.fill_(torch.inf)
        else:
            adapter = next(iter(adapters_of(model).values()))
            adapter.lora_A.register_hook(lambda gradient: gradient * torch.nan)

    def spoil_after_the_first_step(event):
        if isinstance(event, Step):
            spoil(models[0])

    models = []
    original_loop = session.train_loop
    monkeypatch.setattr(session, "train_loop", lambda m, *a, **k: models.append(m.module) or original_loop(m, *a, **k))
    with pytest.raises(TrainingError, match=rf"(?s)Step 2: the {what} is (nan|inf).*rows\.jsonl:\d+.*--lr") as raised:
        options = {"max_steps": 3, "eval_every": 3, "schedule": "constant", "warmup": 0, "micro_batch_size": 2}
        train(config(tiny_model, data, tmp_path / "bad", **options), spoil_after_the_first_step)
    rows = 2 if what == "loss" else 6  # of the micro-batch, or of the step
    assert len(re.findall(r"rows\.jsonl:\d+", str(raised.value))) == rows
    assert adapter_digest(tmp_path / "bad") == adapter_digest(good)


def test_ctrl_c_finishes_the_step_saves_and_exits_130(tiny_model, data, tmp_path):
    out = tmp_path / "run"
    arguments = ["train", "--model", tiny_model, "--data", data, "--out", out, "--rows-per-step", 2]
    process = nybble(*arguments, "--max-steps", 100000, "--eval-every", 100000, output=tmp_path / "printed")
    process.wait_for(out / "events.jsonl", '"step"')
    os.kill(process.pid, signal.SIGINT)
    code, printed = process.end()
    assert code == 130, printed
    assert "Interrupted after step" in printed and "Traceback" not in printed
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    assert len(losses(out)) < 100000


def test_a_model_that_mixes_packed_rows_is_planned_for_padded_ones_and_trains_on_the_same_loss(
    tiny_model, data, tmp_path
):
    """Bloom takes no positions: packed rows would see each other."""
    folder = tmp_path / "bloom"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("model*", "config.json"))
    vocabulary = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    BloomForCausalLM(BloomConfig(vocab_size=vocabulary, bos_token_id=None, **shape)).save_pretrained(folder)
    first = run(folder, data, tmp_path / "asked packed", max_steps=2)
    second = run(folder, data, tmp_path / "asked padded", max_steps=2, packing=False)
    assert "rows are padded" in json.loads((tmp_path / "asked packed" / "plan.json").read_text())["chosen"]["path"]
    assert first.loss_before == pytest.approx(second.loss_before, rel=1e-6)
    assert losses(tmp_path / "asked packed") == pytest.approx(losses(tmp_path / "asked padded"), rel=1e-5)
