"""--rank auto: what tokens bound, what the probe measures, and that a run with it is that of the rank given."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_data

import nybble
from nybble.evaluation.model_card import card_text
from nybble.events import Event
from nybble.options.verbs import load_config
from nybble.planning import ranks
from nybble.planning.ranks import RankChosen, enough_rank
from nybble.runs.events import read_events
from nybble.runs.open_run import open_run
from nybble.training import rank as rank_module
from nybble.training.rank import energy_shares
from nybble.training.session import train


@pytest.mark.parametrize(
    ("tokens", "parameters", "rank"),
    [
        (1_000_000, 305_000, 8),
        (4_880_000, 305_000, 8),
        (4_900_000, 305_000, 16),
        (10**8, 2_600_000, 32),
        (10**12, 1, 128),
    ],
)
def test_two_bits_a_parameter_hold_one_bit_a_token(tokens: int, parameters: int, rank: int) -> None:
    chosen = enough_rank(tokens, parameters)
    assert chosen.rank == rank and f"{tokens:,} supervised tokens" in chosen.why
    assert rank in (8, 128) or 2 * rank * parameters >= tokens > rank * parameters


def test_shares_are_those_of_singular_values() -> None:
    gradients = torch.randn(30, 6, dtype=torch.float64) @ torch.diag(torch.tensor([9.0, 5, 3, 1, 0.1, 0]).double())
    squares = torch.linalg.svdvals(gradients).square()
    assert torch.allclose(energy_shares(gradients.T @ gradients), squares.cumsum(0) / squares.sum())
    assert energy_shares(torch.zeros(3, 3)).tolist() == [1, 1, 1]


@pytest.fixture
def start(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "LEAST_RANK", 1)
    monkeypatch.setattr(rank_module, "LEAST_RANK", 1)
    monkeypatch.setattr(ranks, "BITS_A_TOKEN", 600)  # so that few rows fill a rank of 8
    data = make_data(tmp_path / "rows.jsonl")

    def run(out: str, heard: list[Event] | None = None, **more: Any):
        options = {"model": str(tiny_model), "data": str(data), "out": str(tmp_path / out), "max_steps": 3}
        options |= {"rows_per_step": 6, "compute_dtype": "fp32", "quality": "absmax", "rank": "auto", "save_every": 1}
        options |= {"lr": 5e-3, "micro_batch_size": 3, "keep_checkpoints": 9, "dropout": 0.2}
        report = (heard if heard is not None else []).append
        return train(load_config(None, options | more), report).folder

    return run


def adapter(run: Any) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def test_after_the_probe_the_run_is_that_of_the_rank_given(start) -> None:
    heard: list[Event] = []
    run = start("auto", heard)
    bound, probed = (event for event in heard if isinstance(event, RankChosen))
    assert bound.rank > probed.rank and "of the energy" in probed.why
    assert [event["rank"] for event in read_events(run.events, "rank")] == [bound.rank, probed.rank]
    assert adapter(run) == adapter(start("given", rank=probed.rank))
    change = {"value": 0.0, "low": 0.0, "high": 0.0}
    report = {
        "lm_eval": {},
        "loss_change": {"base, as trained on": change},
        "rows": 1,
        "supervised_tokens": 1,
        "arms": {},
    }
    assert f"| rank | {probed.rank}, found by the run |" in card_text(open_run(run.path), report)

    stopped = run.path.with_name("stopped")
    shutil.copytree(run.path, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-3")
    heard.clear()
    resumed = train(load_config(stopped / "config.yaml", {"out": str(stopped), "resume": True}), heard.append)
    assert adapter(resumed.folder) == adapter(run) and not [e for e in heard if isinstance(e, RankChosen)]


def test_the_probe_measures_the_gradients_of_the_largest_rank(start, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    shares = energy_shares

    def watch(gram: torch.Tensor) -> torch.Tensor:
        seen.append(gram)
        return shares(gram)

    monkeypatch.setattr(rank_module, "energy_shares", watch)
    monkeypatch.setattr(rank_module, "ENOUGH", 1.1)  # never enough: the bound stays
    heard: list[Event] = []
    run = start("whole", heard, max_steps=1, micro_batch_size=6, dropout=0.0, max_grad_norm=1e9)
    bound, probed = (event for event in heard if isinstance(event, RankChosen))
    assert probed.rank == bound.rank > 1 and "100% of the energy" in probed.why
    # One micro-batch is the first step: all layers' gradients of B together have the norm that this step reports, but
    # for A's, which are zero where B is.
    (step,) = read_events(run.events, "step")
    assert sum(gram.trace().item() for gram in seen) ** 0.5 == pytest.approx(step["grad_norm"], rel=1e-4)


def test_a_plan_is_for_the_most_that_it_takes(tiny_model: Path, data: Path) -> None:
    heard: list[Event] = []
    card = {"machine": "rtx-4090", "host_memory": "16GB"}
    planned = nybble.plan(model="llama-3-8b", rank="auto", on_event=heard.append, **card)
    assert planned.asked.run.rank == 128 and [event.rank for event in heard if isinstance(event, RankChosen)] == [128]
    assert planned.chosen.peak_bytes == nybble.plan(model="llama-3-8b", rank=128, **card).chosen.peak_bytes
    tokens = nybble.check_data(model=tiny_model, data=data).audit.supervised_tokens
    found = nybble.plan(model=tiny_model, data=data, rank="auto", on_event=heard.append)
    assert found.asked.run.rank == enough_rank(tokens, 2048).rank and f"{tokens:,} supervised tokens" in heard[-1].why
