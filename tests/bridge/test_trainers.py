"""transformers' Trainer and TRL's, unchanged, on models in few bits: the programs in examples/."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
TRL = next(ROOT.glob(".venv-oracles/lib/python*/site-packages/trl"), None)
STEPS = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 2, "use_cpu": True}


def losses(trainer: Any) -> list[float]:
    return [each["loss"] for each in trainer.state.log_history if "loss" in each]


def test_trainer_learns_and_goes_on_to_the_bit(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    fine_tune = runpy.run_path(str(ROOT / "examples" / "trainer.py"))["fine_tune"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Layers train through their own code")
        whole = fine_tune(tiny_model, data, tmp_path / "whole", **STEPS)
    assert losses(whole)[-1] < losses(whole)[0]
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    (tmp_path / "cut" / "adapter_model.safetensors").unlink()
    resumed = fine_tune(tiny_model, data, tmp_path / "cut", resume=True, **STEPS)
    assert losses(resumed) == losses(whole)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


PROGRAM = """
import json, sys
from pathlib import Path
sys.path.insert(0, {examples!r})
import sft
given = json.loads({given!r})
base, data, out = Path({base!r}), Path({data!r}), Path({out!r})
trainer = sft.fine_tune(base, data, out, **given)
accelerated = [type(layer).__name__ for layer in trainer.model.get_base_model().model.layers]
losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
print("RESULT", json.dumps([losses, accelerated]))
"""


def sft(base: Path, data: Path, out: Path, **given: Any) -> tuple[list[float], list[str]]:
    names = {"examples": str(ROOT / "examples"), "base": str(base), "data": str(data), "out": str(out)}
    program = PROGRAM.format(given=json.dumps(given), **names)
    assert TRL is not None
    env = os.environ | {"PYTHONPATH": str(TRL.parent)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return json.loads(line.removeprefix("RESULT"))


@pytest.mark.slow
@pytest.mark.skipif(TRL is None, reason="no TRL: `make .venv-oracles/.installed` needs PyPI")
def test_sft_trainer_with_and_without_blocks_and_resumed(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    plain, _ = sft(tiny_model, data, tmp_path / "plain", fast=False, **STEPS)
    fast, layers = sft(tiny_model, data, tmp_path / "fast", **STEPS)
    assert layers == ["AcceleratedLlamaDecoderLayer"] * 2
    assert fast == pytest.approx(plain, rel=2e-3) and fast[-1] < fast[0]
    shutil.rmtree(tmp_path / "fast" / "checkpoint-4")
    resumed, _ = sft(tiny_model, data, tmp_path / "fast", resume=True, **STEPS)
    assert resumed[:3] == fast[:3], "what is loaded is what was saved"
    assert resumed == pytest.approx(fast, rel=1e-3)  # TRL trains adapters in bf16 until it has loaded some
