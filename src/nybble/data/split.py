"""The validation split: seeded, and no row of it says the same as a training row."""

import hashlib
from collections.abc import Iterable

import numpy as np

from nybble.data.examples import Example


def content_ranks(examples: Iterable[Example], seed: int = 0) -> np.ndarray:
    """16 bytes of each row, S16 `(len(examples),)`: the same for rows with the same `content_key`, in an order that is
    drawn by `seed`."""
    ranks = bytearray()
    for example in examples:
        ranks += hashlib.sha256(f"{seed}/{example.content_key}".encode()).digest()[:16]
    return np.frombuffer(ranks, dtype="S16")


def split_validation(ranks: np.ndarray, fraction: float = 0.05, max_rows: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (train, validation), int64, each in the order of the rows.

    Rows that say the same go to the same side. The sides are drawn by a hash of (seed, content), so they do not depend
    on the order of the rows, and rows added later leave most others on their side.

    Args:
        ranks: `content_ranks` of the rows.
        fraction: of the rows; at least one row is held out where it is above 0 and two different rows exist.
        max_rows: an upper limit to the validation rows.
    """
    order = np.argsort(ranks, kind="stable")
    starts = group_starts(ranks[order])
    everything = np.arange(len(ranks))
    if fraction <= 0 or max_rows < 1 or len(starts) < 2:
        return everything, everything[:0]
    wanted = min(max_rows, max(1, round(fraction * len(ranks))))
    sizes = np.diff(starts, append=len(ranks))
    drawn: list[int] = []
    count = 0
    for group in range(len(starts)):
        if count + sizes[group] <= wanted:
            drawn.append(group)
            count += sizes[group]
        if count == wanted:
            break
    if not drawn:  # every group is larger than what is wanted: take the smallest
        drawn = [int(sizes.argmin())]
    validation = np.sort(np.concatenate([order[starts[group] : starts[group] + sizes[group]] for group in drawn]))
    return np.delete(everything, validation), validation


def group_starts(ranked: np.ndarray) -> np.ndarray:
    """Where in sorted ranks another one begins."""
    return np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1])[: len(ranked)])
