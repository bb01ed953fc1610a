"""Which rows an optimizer step sees, and how they are dealt into micro-batches.

Rows are drawn from an endless sequence: the permutation of epoch 0, then that of epoch 1, and so on.
Each step takes the next `rows_per_step` rows, across the border of an epoch where it falls inside a
step, so every step has the same number of rows and no row is ever left out. Data sets with weights make
another such sequence (mixture.py).
"""

import math
from collections.abc import Sequence

import numpy as np

from nybble.data.mixture import Mixture, mixed_order
from nybble.data.permutation import permutation


class StepSampler:
    """Yields the row numbers of one optimizer step after another; restartable at any step.

    Args:
        num_rows: rows in the training set, at least 1.
        rows_per_step: rows of one optimizer step, over all its micro-batches.
        seed: two samplers with the same arguments draw the same rows.
        mixture: the weights of the data sets that the rows are of; None where each row is drawn once an epoch.
    """

    def __init__(self, num_rows: int, rows_per_step: int, seed: int, mixture: Mixture | None = None):
        assert num_rows >= 1 and rows_per_step >= 1, (num_rows, rows_per_step)
        assert mixture is None or sum(mixture.rows) == num_rows, (num_rows, mixture)
        self.num_rows, self.rows_per_step, self.seed, self.mixture = num_rows, rows_per_step, seed, mixture
        self.epoch, self.offset = 0, 0

    def num_steps(self, epochs: float) -> int:
        """Optimizer steps after which `epochs` times the number of rows have been seen, at least 1."""
        return max(1, math.ceil(self.num_rows * epochs / self.rows_per_step))

    def next_step(self) -> list[int]:
        """The rows of the next optimizer step; moves `epoch` and `offset` past them."""
        rows: list[int] = []
        while len(rows) < self.rows_per_step:
            taken = self._order()[self.offset : self.offset + self.rows_per_step - len(rows)].tolist()
            rows.extend(taken)
            self.offset += len(taken)
            if self.offset == self.num_rows:
                self.epoch, self.offset = self.epoch + 1, 0
        return rows

    def _order(self) -> np.ndarray:
        """The rows of this epoch."""
        if self.mixture is not None:
            return mixed_order(self.mixture, self.seed, self.epoch)
        return permutation(self.num_rows, self.seed, f"epoch {self.epoch}")

    def state(self) -> dict[str, int]:
        """JSON-able position: load it into a sampler over the same rows to continue."""
        return {"seed": self.seed, "num_rows": self.num_rows, "epoch": self.epoch, "offset": self.offset}

    def load_state(self, state: dict[str, int]) -> None:
        """Continue from `state()`; over another number of rows, after as many rows as were seen."""
        seen = state["epoch"] * state["num_rows"] + state["offset"]
        self.seed = state["seed"]
        self.epoch, self.offset = divmod(seen, self.num_rows)


def split_micro_batches(
    rows: Sequence[int], lengths: Sequence[int] | np.ndarray, micro_batch_size: int, packed: bool = True
) -> list[list[int]]:
    """Deal a step's rows into ceil(len(rows) / micro_batch_size) micro-batches of at most that many rows.

    Packed micro-batches are balanced by tokens (longest row first, each to the one with the fewest tokens
    so far), which lowers the peak of memory. Padded ones hold neighbours in length, which wastes the
    least padding. The heaviest micro-batch comes first, so that a step that does not fit fails at once.

    Args:
        rows: row numbers of one step.
        lengths: tokens of every row of the data set, indexed by row number.
    """
    assert micro_batch_size >= 1, micro_batch_size
    tokens = {row: int(lengths[row]) for row in rows}
    longest_first = sorted(rows, key=lambda row: (-tokens[row], row))
    if not packed:
        return [longest_first[i : i + micro_batch_size] for i in range(0, len(rows), micro_batch_size)]
    batches: list[list[int]] = [[] for _ in range(math.ceil(len(rows) / micro_batch_size))]
    for row in longest_first:
        open_batches = [batch for batch in batches if len(batch) < micro_batch_size]
        min(open_batches, key=lambda batch: sum(tokens[r] for r in batch)).append(row)
    return sorted(batches, key=lambda batch: -sum(tokens[r] for r in batch))
