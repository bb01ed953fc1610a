"""transformers' Trainer and TRL's, unchanged, on models in few bits: the programs in examples/."""

import itertools
import json
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import make_data
from transformers import AutoModelForCausalLM, AutoTokenizer

import nybble
from nybble.training.events import Step

ROOT = Path(__file__).parents[2]
TRL = next(ROOT.glob(".venv-oracles/lib/python*/site-packages/trl"), None)
PROGRAM = Path(__file__).with_name("train_with_trl.py")
STEPS = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 2, "use_cpu": True}


def losses(trainer: Any) -> list[float]:
    return [each["loss"] for each in trainer.state.log_history if "loss" in each]


def test_trainer_learns_and_goes_on_to_the_bit(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    make_trainer = runpy.run_path(str(ROOT / "examples" / "trainer.py"))["make_trainer"]
    whole, resumed = (make_trainer(tiny_model, data, tmp_path / name, **STEPS) for name in ("whole", "resumed"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Layers train through their own code")
        whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    evaluate = runpy.run_path(str(PROGRAM))["Evaluate"]
    resumed.add_callback(evaluate(resumed, rows=4))  # gradients after an evaluation are those without one
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert len([each for each in resumed.state.log_history if "eval_loss" in each]) == 2
    for trainer in (whole, resumed):
        trainer.save_model()
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


needs_trl = pytest.mark.skipif(TRL is None, reason="no TRL: `make .venv-oracles/.installed` needs PyPI")
PAIRS = [{"prompt": f"{n} plus {n}?", "chosen": f" It is {2 * n}.", "rejected": " No idea."} for n in range(24)]
EXACT = STEPS | {"bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
GIVEN: dict[str, dict[str, Any]] = {
    "sft": {},
    "dpo": {"learning_rate": 1e-3},
    "grpo": {"num_generations": 4, "max_completion_length": 8, "beta": 0.1, "learning_rate": 1e-3},
}


def jobs_done(folder: Path, base: Path, data: Path, program: str, **jobs: dict[str, Any]) -> dict[str, Any]:
    """What each job of train_with_trl.py logged, in a process of theirs, with its adapter's tensors; `given` goes over
    `EXACT` and what the program needs.
    """
    assert TRL is not None
    written = []
    for name, job in jobs.items():
        given = EXACT | GIVEN[program] | job.get("given", {})
        files = {
            "base": str(base),
            "data": str(data),
            "out": str(folder / name),
            "result": str(folder / f"{name}.json"),
        }
        written.append({"program": program, "fp32": True} | files | job | {"given": given})
    env = os.environ | {"PYTHONPATH": str(TRL.parent)}
    command = [sys.executable, str(PROGRAM)]
    done = subprocess.run(command, input=json.dumps(written), stderr=subprocess.PIPE, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name in jobs}
    for name, result in results.items():
        result["adapter"] = load_file(folder / name / "adapter_model.safetensors")
        result["said"] = done.stderr
    return results


def of(result: Any, key: str) -> list[float]:
    return [each[key] for each in result["log"]]


def assert_same_adapters(one: Any, other: Any) -> None:
    one, other = one["adapter"], other["adapter"]
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@needs_trl
@pytest.mark.parametrize("program", GIVEN)
def test_trl_with_and_without_blocks_evaluated_and_resumed(
    program: str, tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    rows = make_data(tmp_path / "pairs.jsonl", PAIRS) if program == "dpo" else data
    ran = jobs_done(
        tmp_path, tiny_model, rows, program,
        plain={"given": {"fast": False}},
        fast={},
        evaluated={"evaluate": 4},
        resumed={"resume": str(tmp_path / "fast" / "checkpoint-2")},
        usual={"fp32": False, "given": {"bf16": None, "gradient_checkpointing": True}},
        usual_plain={"fp32": False, "given": {"bf16": None, "gradient_checkpointing": True, "fast": False}},
    )  # fmt: skip
    plain, fast, evaluated, resumed = (ran[name] for name in ("plain", "fast", "evaluated", "resumed"))
    assert plain["layers"] == ["LlamaDecoderLayer"] * 2 and fast["layers"] == ["AcceleratedLlamaDecoderLayer"] * 2
    assert "train through their own code" not in fast["said"]
    for key in ("loss", "grad_norm"):
        assert of(fast, key) == pytest.approx(of(plain, key), rel=1e-4, abs=1e-6), key
    for name, tensor in fast["adapter"].items():
        torch.testing.assert_close(tensor, plain["adapter"][name], rtol=1e-3, atol=1e-5)
    assert any(tensor.norm() > 0 for name, tensor in fast["adapter"].items() if "lora_B" in name)
    assert len(evaluated["evaluated"]) == STEPS["max_steps"]
    assert_same_adapters(evaluated, fast)
    assert of(resumed, "loss") == of(fast, "loss")
    assert_same_adapters(resumed, fast)
    usual, usual_plain = ran["usual"], ran["usual_plain"]
    assert usual["dtypes"] == ["torch.bfloat16"]
    key = "reward" if program == "grpo" else "loss"
    assert of(usual, key) == pytest.approx(of(usual_plain, key), rel=2e-2)
    if program != "grpo":
        assert of(fast, "loss")[-1] < of(fast, "loss")[0]


@pytest.mark.slow
@needs_trl
def test_rows_side_by_side_go_through_the_blocks(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    free, packed = {"padding_free": True, "max_length": None}, {"packing": True, "max_length": 64}
    ran = jobs_done(
        tmp_path, tiny_model, data, "sft",
        padded={"given": {"fast": False}},
        free={"given": free | {"fast": False}},
        fast_free={"given": free},
        packed={"given": packed | {"fast": False}},
        fast_packed={"given": packed},
    )  # fmt: skip
    assert "train through their own code" not in ran["padded"]["said"]
    losses_of = {name: of(result, "loss") for name, result in ran.items()}
    for name, expected in (("free", "padded"), ("fast_free", "padded"), ("fast_packed", "packed")):
        assert losses_of[name] == pytest.approx(losses_of[expected], rel=1e-4), name
    assert losses_of["packed"] != losses_of["free"]


@pytest.fixture
def rounded_base(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny Llama with weights that bf16 holds: a run keeps embedding and head so."""
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model).bfloat16().float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def rows_in_order(base: Path, data: Path, path: Path, **how: int) -> Path:
    """What `nybble train` learns from, a tokenised row a line, in the order of its steps."""
    rows = []
    steps = nybble.load_data(data, nybble.open_model(base), max_seq_len=128).steps(packed=False, **how)
    for batch in itertools.chain.from_iterable(steps):
        labels = batch.targets.roll(1, dims=1)  # TRL shifts them itself
        labels[:, 0] = -100
        for ids, learnt, mask in zip(batch.input_ids, labels, batch.attention_mask == 1, strict=True):
            rows.append({"input_ids": ids[mask].tolist(), "labels": learnt[mask].tolist()})
    return make_data(path, rows)


@pytest.mark.slow
@needs_trl
def test_losses_are_those_of_nybble_train(rounded_base: Path, data: Path, tmp_path: Path) -> None:
    base = nybble.quantize_(AutoModelForCausalLM.from_pretrained(rounded_base))
    adapter = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base, adapter).save_pretrained(tmp_path / "begun")
    rows = rows_in_order(rounded_base, data, tmp_path / "rows_in_order.jsonl", rows=8, micro_batch_size=4, max_steps=6)
    alike: dict[str, Any] = {"max_steps": 6, "weight_decay": 0.01, "max_grad_norm": 0.5}
    given = alike | {
        "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "warmup_steps": 0, "gradient_accumulation_steps": 2,
        "adam_beta2": 0.999, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    job = {"adapter": str(tmp_path / "begun"), "given": given}
    usual = {"adapter": str(tmp_path / "begun"), "fp32": False, "given": given | {"bf16": None}}
    ran = jobs_done(tmp_path, rounded_base, rows, "sft", fp32=job, bf16=usual)
    for dtype, tolerance in (("fp32", 1e-4), ("bf16", 2e-2)):
        seen: list[Any] = []
        nybble.train(
            model=rounded_base, data=data, adapter=tmp_path / "begun", out=tmp_path / f"ours_{dtype}",
            quality="absmax", max_seq_len=128, rows_per_step=8, micro_batch_size=4, lr=2e-3, schedule="cosine",
            warmup=0, beta2=0.999, compute_dtype=dtype, on_event=seen.append, **alike,
        )  # fmt: skip
        steps = [each for each in seen if isinstance(each, Step)]
        assert of(ran[dtype], "learning_rate") == pytest.approx([each.lr for each in steps])
        assert of(ran[dtype], "grad_norm") == pytest.approx([each.grad_norm for each in steps], rel=10 * tolerance)
        assert of(ran[dtype], "loss") == pytest.approx([each.loss for each in steps], rel=tolerance)
        assert steps[-1].loss < steps[0].loss and steps[0].grad_norm > alike["max_grad_norm"]
