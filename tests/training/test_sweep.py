"""--lr auto: the rule, what a sweep costs, and that a run after it is the run with the rate given."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_data
from transformers import LlamaConfig, Qwen3Config

from nybble.data.examples import EncodedExample
from nybble.data.sampler import StepSampler
from nybble.events import Event
from nybble.options.adapter_groups import NewAdapters
from nybble.options.verbs import load_config
from nybble.runs.events import read_events
from nybble.runs.folder import RunFolder
from nybble.training import sweep
from nybble.training.events import RateTried
from nybble.training.session import train
from nybble.training.sweep import plan_sweep, suggested_lr

STEPS = 10  # two of each candidate, where a sweep may take as many as the run
PAIRS = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": f"It is {n + 1}."} for n in range(40)]


# ---- the rule and the plan -----------------------------------------------------------------------


def test_the_rule_is_the_published_one() -> None:
    plain = NewAdapters()
    # Its authors' figures for Llama-3.1-8B and Qwen3-8B, both of width 4096.
    assert suggested_lr(LlamaConfig(hidden_size=4096), plain, False) == pytest.approx(2.86e-4, rel=1e-2)
    assert suggested_lr(Qwen3Config(hidden_size=4096), plain, False) == pytest.approx(4.73e-4, rel=1e-2)


def test_what_scales_the_product_more_learns_with_less() -> None:
    config = LlamaConfig(hidden_size=2000, num_attention_heads=20, num_key_value_heads=20)
    assert suggested_lr(config, NewAdapters(), False) == suggested_lr(config, NewAdapters(rank=64), False) == 5e-4
    assert suggested_lr(config, NewAdapters(alpha=64.0), False) == 2.5e-4
    assert suggested_lr(config, NewAdapters(alpha=8.0, rank=16, rslora=True), False) == 5e-4  # 8 / sqrt(16) = 32 / 16
    assert 5e-6 < suggested_lr(config, NewAdapters(), True) < 5e-5
    assert suggested_lr(config, NewAdapters(alpha=64.0), False, every_weight=True) == 5e-5


def rows(count: int) -> list[EncodedExample]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(5, 50, count).tolist()
    return [EncodedExample(torch.zeros(n, dtype=torch.int32), torch.ones(n, dtype=torch.bool), f"{n}") for n in lengths]


@pytest.mark.parametrize(("total_steps", "rates"), [(2000, 5), (400, 5), (399, 3), (240, 3), (239, 1), (1, 1)])
def test_a_sweep_takes_a_tenth_of_the_run(total_steps: int, rates: int) -> None:
    train_rows = rows(100)
    plan = plan_sweep(1e-3, train_rows, rows(300), StepSampler(100, 4, 0), total_steps)
    assert len(plan.rates) == rates and sorted(plan.rates) == list(plan.rates) and 1e-3 in plan.rates
    assert bool(plan.why_none) == (rates == 1)
    assert rates * plan.steps <= total_steps / 10
    sampler = StepSampler(100, 4, 0)
    drawn = [row for _ in range(plan.steps) for row in sampler.next_step()]
    assert sum(map(len, plan.rows)) <= sum(len(train_rows[row]) for row in drawn)


def test_rows_are_held_back_where_none_is_held_out() -> None:
    train_rows = rows(500)
    plan = plan_sweep(1e-3, train_rows, [], StepSampler(500, 4, 0), 400)
    sampler = StepSampler(500, 4, 0)
    drawn = {id(train_rows[row]) for _ in range(plan.steps) for row in sampler.next_step()}
    assert plan.rows and drawn.isdisjoint(map(id, plan.rows))
    few = plan_sweep(1e-3, train_rows[:4], [], StepSampler(4, 4, 0), 400)
    assert len(few.rates) == 1 and "no row is left" in few.why_none


def test_the_lowest_loss_wins_and_what_is_not_finite_does_not() -> None:
    assert sweep._best({1.0: 3.0, 2.0: 2.0, 4.0: None}, 2.0)[0] == 2.0
    best, why = sweep._best({1.0: 1.0, 2.0: 2.0, 4.0: None}, 2.0)
    assert best == 1.0 and "lowest that was tried" in why
    assert sweep._best({1.0: None, 2.0: None}, 2.0)[0] == 2.0


# ---- runs ----------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "sft": {"dropout": 0.2},
    "paged": {"page_optimizer": "always", "neftune_alpha": 5.0},
    "dpo": {"objective": "dpo"},
}


@pytest.fixture
def two_steps_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "SHARE", 1.0)
    monkeypatch.setattr(sweep, "LEAST_STEPS", 2)


@pytest.fixture(scope="module")
def start(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    tmp_path = tmp_path_factory.mktemp("runs")
    sets = {"sft": make_data(tmp_path / "rows.jsonl"), "dpo": make_data(tmp_path / "pairs.jsonl", PAIRS)}

    def run(out: str, report: Any = lambda event: None, **more: Any):
        data = sets[more.get("objective", "sft")]
        options = {"model": str(tiny_model), "data": str(data), "out": str(tmp_path / out), "max_steps": STEPS}
        options |= {"rows_per_step": 4, "rank": 4, "compute_dtype": "fp32", "quality": "absmax", "lr": "auto"}
        options |= {"save_every": 4, "eval_every": STEPS, "schedule": "constant", "warmup": 0}
        if more.get("resume"):
            options = {"out": str(tmp_path / out)}
            return train(load_config(tmp_path / out / "config.yaml", options | more), report)
        return train(load_config(None, options | more), report)

    return run


def kept(out: Path) -> dict[str, bytes]:
    """What must not depend on how the rate was found, or how often the run stopped."""
    last = out / "checkpoints" / f"step-{STEPS}"
    return {path.name: path.read_bytes() for path in last.iterdir() if path.suffix == ".safetensors"}


@pytest.fixture(scope="module")
def made(start):
    """Runs that began with a sweep, by name; each is made once."""
    runs: dict[str, RunFolder] = {}

    def get(name: str) -> RunFolder:
        if name not in runs:
            runs[name] = start(name, **RUNS[name]).folder
        return runs[name]

    return get


@pytest.mark.usefixtures("two_steps_each")
@pytest.mark.parametrize("name", ["sft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("paged", "dpo"))])
def test_after_a_sweep_the_run_is_that_of_the_rate_given(start, made, name: str) -> None:
    run = made(name)
    (chosen,) = read_events(run.events, "lr")
    tried = {event["lr"]: event["loss"] for event in read_events(run.events, "lr-tried")}
    small = {event["lr"]: event["small_lr"] for event in read_events(run.events, "lr-tried")}
    assert len(tried) == 5 and chosen["lr"] == min(tried, key=tried.__getitem__)
    assert run.rates_plot.read_bytes().startswith(b"\x89PNG")
    given = start(f"{name}, given", lr=chosen["lr"], **RUNS[name]).folder
    assert kept(run.path) == kept(given.path)
    # A candidate is a run of its own: one of so many steps ends with the loss that the sweep saw.
    least = min(tried)
    assert small[least] == pytest.approx(least * (STEPS / 2) ** 0.32)
    alone = start(f"{name}, alone", lr=small[least], **RUNS[name] | {"max_steps": 2, "eval_every": 2}).folder
    assert list(read_events(alone.events, "eval"))[-1]["loss"] == pytest.approx(tried[least], rel=1e-6)
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("two_steps_each")
def test_a_stopped_run_goes_on_with_its_rate_and_a_stopped_sweep_begins_anew(start, made) -> None:
    whole = made("sft")
    stopped = whole.path.with_name("stopped")
    shutil.copytree(whole.path, stopped)
    shutil.rmtree(stopped / "checkpoints" / f"step-{STEPS}")
    heard: list[Event] = []
    assert start("stopped", heard.append, resume=True).steps == STEPS
    assert not [event for event in heard if isinstance(event, RateTried)]
    assert kept(stopped) == kept(whole.path)

    def interrupt(event: Event) -> None:
        if isinstance(event, RateTried):
            os.kill(os.getpid(), signal.SIGINT)

    result = start("sweep", interrupt, **RUNS["sft"])
    assert result.interrupted is signal.SIGINT and result.steps == 0
    assert (result.adapter / "adapter_model.safetensors").is_file()
    assert start("sweep", resume=True).steps == STEPS
    assert kept(result.folder.path) == kept(whole.path)


def test_a_short_run_says_that_the_rule_decides(start) -> None:
    run = start("short", max_steps=1, eval_every=1).folder
    (chosen,) = read_events(run.events, "lr")
    assert "width suggests" in chosen["why"] and not run.rates_plot.exists()
    assert [event["lr"] for event in read_events(run.events, "step")] == [chosen["lr"]]
