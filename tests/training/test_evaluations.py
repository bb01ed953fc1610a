"""What a run evaluates: a tenth of its tokens at most, the same rows each time, given flags as they were given."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from nybble.cli.main import app
from nybble.data.examples import EncodedExample
from nybble.options.groups import DataOptions
from nybble.training.evaluations import ALWAYS_AFFORDABLE, Evaluations, plan_evaluations

ROWS_PER_STEP = 16


def rows(count: int, name: str) -> list[EncodedExample]:
    lengths = [20 + n % 7 for n in range(count)]
    return [
        EncodedExample(torch.zeros(n, dtype=torch.int32), torch.ones(n, dtype=torch.bool), f"{name}:{i}")
        for i, n in enumerate(lengths)
    ]


TRAIN, HELD_OUT = rows(7000, "train"), rows(373, "held-out")


def evaluations(
    steps: int,
    held_out: list[EncodedExample] = HELD_OUT,
    begun_with: int | None = None,
    eval_every: int | None = None,
    **options: Any,
) -> Evaluations:
    data = DataOptions(data="d", **options)
    return plan_evaluations(data, eval_every, TRAIN, held_out, ROWS_PER_STEP, steps, begun_with)


def spent(found: Any, steps: int) -> float:
    times = 1 + -(-steps // found.every)
    mean = sum(map(len, TRAIN)) / len(TRAIN)
    return times * sum(map(len, found.rows)) / (steps * ROWS_PER_STEP * mean)


@pytest.mark.parametrize("steps", [12, 100, 437, 3000])
def test_evaluations_take_about_a_tenth_of_the_tokens_at_most(steps: int) -> None:
    found = evaluations(steps)
    assert spent(found, steps) < 0.105
    assert len(found.rows) >= ALWAYS_AFFORDABLE
    assert (len(found.rows) < 373 or found.every > steps // 5) == bool(found.note)


def test_where_there_is_room_all_rows_are_evaluated_five_times() -> None:
    found = evaluations(3000)
    assert (found.rows, found.every, found.note) == (HELD_OUT, 600, "")


def test_rows_are_drawn_by_the_seed_and_stand_in_their_order() -> None:
    first, again = (evaluations(12).rows for _ in range(2))
    other = evaluations(12, seed=1).rows
    numbers = [int(row.origin.split(":")[1]) for row in first]
    assert [r.origin for r in first] == [r.origin for r in again] != [r.origin for r in other]
    assert numbers == sorted(numbers)


def test_what_is_given_stands() -> None:
    assert evaluations(12, eval_every=1).every == 1
    given = evaluations(12, validation_rows=373, eval_every=2)
    assert (given.rows, given.every, given.note) == (HELD_OUT, 2, "")


def test_a_run_that_goes_on_keeps_its_rows() -> None:
    begun = evaluations(12).rows
    longer = evaluations(3000, begun_with=len(begun), eval_every=3).rows
    assert [row.origin for row in longer] == [row.origin for row in begun]
    few = evaluations(12, HELD_OUT[:5])
    assert (few.rows, few.every) == (HELD_OUT[:5], 2)


def test_runs_without_held_out_rows_end_well(tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "one.jsonl"
    data.write_text('{"prompt": "What is 2 plus 2?", "completion": "It is 4."}\n')
    command = ["train", "--model", str(tiny_model), "--data", str(data), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*command, "--max-steps", "2", "--memory", "8GB"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "no row is held out" in result.output and "nybble eval" not in result.output
