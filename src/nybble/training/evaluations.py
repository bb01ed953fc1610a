"""When a run evaluates and on which held-out rows, so that short runs do not spend their time on them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from nybble.data.encoded_rows import lengths_of
from nybble.data.examples import EncodedExample
from nybble.options.groups import RowOptions

SHARE = 0.1  # of the training's tokens that evaluations together may come to
PER_RUN = 5  # evaluations after the first, where that share allows it
ALWAYS_AFFORDABLE = 8  # rows


@dataclass(frozen=True)
class Evaluations:
    """What is evaluated.

    Args:
        rows: the same at every evaluation, so that losses before and after can be compared.
        every: steps between evaluations; one at the beginning and one at the end there always are.
        note: what was chosen and how to choose otherwise; empty where nothing is left out.
    """

    rows: Sequence[EncodedExample]
    every: int
    note: str = ""


def plan_evaluations(
    options: RowOptions,
    eval_every: int | None,
    train: Sequence[EncodedExample],
    validation: Sequence[EncodedExample],
    rows_per_step: int,
    total_steps: int,
    begun_with: int | None = None,
) -> Evaluations:
    """All held-out rows about five times a run; fewer times, and then fewer rows, where that takes more than a tenth
    of the training's tokens. --eval-every and --validation-rows stand as they were given.

    Args:
        eval_every: steps between evaluations, where the user says so.
        begun_with: rows that the run evaluated before it was interrupted: it goes on with the same.
    """
    every = eval_every or max(1, total_steps // PER_RUN)
    if len(validation) <= ALWAYS_AFFORDABLE:
        return Evaluations(validation, every)
    budget = SHARE * total_steps * rows_per_step * int(lengths_of(train).sum()) / len(train)
    tokens = int(lengths_of(validation).sum())
    if eval_every is None and tokens * _times(total_steps, every) > budget:
        every = _widest(total_steps, int(budget // tokens))
    rows = validation
    if begun_with is not None:
        rows = _drawn(validation, begun_with, options.seed)
    elif options.validation_rows == RowOptions.model_fields["validation_rows"].default:
        rows = _affordable(validation, budget / _times(total_steps, every), options.seed)
    return Evaluations(rows, every, _note(len(rows), len(validation), every, total_steps, eval_every is None))


def _times(total_steps: int, every: int) -> int:
    """Evaluations of a run: before the first step, every so many, after the last."""
    return 1 + -(-total_steps // every)


def _widest(total_steps: int, times: int) -> int:
    """Steps between evaluations so that there are at most so many, but two."""
    return -(-total_steps // max(1, times - 1))


def _affordable(rows: Sequence[EncodedExample], tokens: float, seed: int) -> Sequence[EncodedExample]:
    """Rows of so many tokens together at most, but at least ALWAYS_AFFORDABLE rows."""
    count = len(rows)
    while count > ALWAYS_AFFORDABLE and sum(map(len, _drawn(rows, count, seed))) > tokens:
        count = max(ALWAYS_AFFORDABLE, count - max(1, count // 16))
    return _drawn(rows, count, seed)


def _drawn(rows: Sequence[EncodedExample], count: int, seed: int) -> Sequence[EncodedExample]:
    """So many rows drawn by `seed`, in their order."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [rows[row] for row in sorted(order[:count])]


def _note(num_rows: int, num_all: int, every: int, total_steps: int, chosen_interval: bool) -> str:
    usual = max(1, total_steps // PER_RUN)
    if num_rows == num_all and (not chosen_interval or every == usual):
        return ""
    when = "before and after" if every >= total_steps else f"before and every {every} steps"
    return (
        f"evaluating {num_rows} of {num_all} held-out rows {when}, so that it takes about a tenth of the training's "
        "tokens; --eval-every and --validation-rows say otherwise, and `nybble eval` asks all rows"
    )
