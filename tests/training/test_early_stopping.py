"""A run stops where its held-out loss no longer falls, and keeps the adapter that was best."""

from pathlib import Path
from typing import Any

import pytest
from tiny import make_data

from nybble.errors import ConfigError
from nybble.options.verbs import load_config
from nybble.runs.events import read_events
from nybble.training.session import train

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def start(tiny_model: Path, data: Path, tmp_path: Path):
    def run(out: str = "run", **more: Any):
        options = {"model": str(tiny_model), "data": str(data), "out": str(tmp_path / out), "rows_per_step": 6}
        options |= {"compute_dtype": "fp32", "quality": "absmax", "eval_every": 1, "save_every": 1, "rank": 4}
        options |= {"schedule": "constant", "warmup": 0, "epochs": 9}
        return train(load_config(None, options | more))

    return run


def test_it_stops_and_keeps_the_best(start, tmp_path: Path) -> None:
    """Held-out answers begin as those that are learnt and end in other words, whose loss soon rises."""
    learnt, held = "red red red blue blue blue", "red red red green green"
    rows = make_data(tmp_path / "rows.jsonl", [{"prompt": f"{n}?", "completion": learnt} for n in range(36)])
    others = make_data(tmp_path / "others.jsonl", [{"prompt": f"{n}?", "completion": held} for n in range(40, 44)])
    wild = {"lr": 0.01, "data": str(rows), "validation_data": str(others), "epochs": 3}
    result = start(early_stopping_patience=2, keep_best=True, **wild)
    losses = {e["step"]: e["loss"] for e in read_events(result.folder.events, "eval")}
    (stopped,) = read_events(result.folder.events, "early-stop")
    best = min(losses, key=losses.__getitem__)
    assert (stopped["step"], stopped["best_step"]) == (best + 2, best) == (max(losses), best)
    assert result.loss_after == losses[best] == stopped["best_loss"]
    kept = (result.adapter / WEIGHTS).read_bytes()
    until = start("until", max_steps=best, **wild) if best else None
    if until is not None:
        assert (until.adapter / WEIGHTS).read_bytes() == kept
    assert (result.folder.checkpoints / f"step-{best + 2}" / WEIGHTS).read_bytes() != kept

    again = train(load_config(result.folder.config, {"out": str(result.folder.path), "resume": True}))
    assert again.steps == best + 2 and (again.adapter / WEIGHTS).read_bytes() == kept


@pytest.mark.parametrize("option", [{"early_stopping_patience": 1}, {"keep_best": True}])
def test_without_held_out_rows_it_is_refused(start, tmp_path: Path, option: dict[str, Any]) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text('{"prompt": "What is one?", "completion": "It is one."}\n')
    with pytest.raises(ConfigError, match="no row is held out"):
        start(data=str(one), **option)
