"""Data sets with weights: how often each one's rows are drawn, and in which order.

A weight is a share of the rows drawn, as `datasets.interleave_datasets` and other trainers mean it, not of tokens: the
audit says what it comes to in tokens. An epoch has as many rows as all sets together, so weights change what is drawn
and not for how long. Each set goes through its rows in a seeded order of its own, and begins a new order when it is
through: of a set that is drawn more often rows come again, of one that is drawn less often some wait for a later epoch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

import numpy as np

from nybble.data.encoded_rows import EncodedRows
from nybble.data.permutation import permutation


@dataclass(frozen=True)
class Mixture:
    """The weights of the parts that a training set is made of, one behind the other.

    Args:
        names: of the parts.
        rows: of each, at least 1.
        weights: whole numbers above 0, in lowest terms.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    weights: tuple[int, ...]

    @classmethod
    def of(cls, names: Sequence[str], rows: Sequence[int], weights: Sequence[Fraction]) -> "Mixture":
        """With weights as the user gave them: only how they compare says anything."""
        scale = math.lcm(*(weight.denominator for weight in weights))
        whole = [int(weight * scale) for weight in weights]
        return cls(tuple(names), tuple(rows), tuple(weight // math.gcd(*whole) for weight in whole))

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the rows drawn; they add up to 1."""
        return tuple(weight / sum(self.weights) for weight in self.weights)

    def drawn(self, count: int) -> list[int]:
        """Rows of each part among the first `count` that are drawn: its share, to within the rows of one round."""
        rounds, rest = divmod(count, sum(self.weights))
        drawn = [rounds * weight for weight in self.weights]
        for part in self._parts(rest):
            drawn[part] += 1
        return drawn

    def describe(self, count: int) -> str:
        """What `count` rows drawn are of, and how often each part is gone through."""
        told = (
            f"{name} {drawn:,} of its {rows:,} rows ({drawn / rows:.2f} times each)"
            if drawn > rows
            else f"{name} {drawn:,} of its {rows:,} rows"
            for name, rows, drawn in zip(self.names, self.rows, self.drawn(count), strict=True)
        )
        return f"{count:,} rows are drawn by weight: {'; '.join(told)}"

    def _parts(self, count: int) -> Iterator[int]:
        """The parts that the first rows of a round are drawn from: always the one that is furthest behind its share
        (smooth weighted round robin). A round has as many rows as the weights add up to, and then begins anew."""
        total, behind = sum(self.weights), [0] * len(self.weights)
        for _ in range(count):
            behind = [late + weight for late, weight in zip(behind, self.weights, strict=True)]
            part = behind.index(max(behind))
            behind[part] -= total
            yield part


@lru_cache(maxsize=2)
def mixed_order(mixture: Mixture, seed: int, epoch: int) -> np.ndarray:
    """int64: the row numbers of one epoch in the order in which they are drawn."""
    num_rows, total = sum(mixture.rows), sum(mixture.weights)
    first = epoch * num_rows
    drawn = mixture.drawn(first)
    starts = list(accumulate(mixture.rows, initial=0))
    begun = first % total
    cycle = np.fromiter(mixture._parts(min(total, begun + num_rows)), dtype=np.int64)
    parts = cycle[(begun + np.arange(num_rows)) % total]
    order = np.empty(num_rows, dtype=np.int64)
    for part, rows in enumerate(mixture.rows):
        places = np.flatnonzero(parts == part)
        order[places] = starts[part] + _endless(rows, seed, part, drawn[part], len(places))
    return order


def _endless(num_rows: int, seed: int, part: int, start: int, count: int) -> np.ndarray:
    """`count` row numbers of a part, from the start-th on that it gives."""
    passes = range(start // num_rows, -(-(start + count) // num_rows))
    orders = [permutation(num_rows, seed, f"part {part} pass {number}") for number in passes]
    skipped = start % num_rows
    return np.concatenate([np.empty(0, dtype=np.int64), *orders])[skipped : skipped + count]


@dataclass(frozen=True)
class MixedPart:
    """A data set that is drawn by weight.

    Args:
        share: of the rows drawn.
        supervised_share: what that comes to in supervised tokens, on average.
        rows: its training sequences.
        drawn: of them in the first epoch; more than `rows` where they come again.
    """

    name: str
    share: float
    supervised_share: float
    rows: int
    drawn: int


def audit_mixture(mixture: Mixture, train: EncodedRows) -> tuple[MixedPart, ...]:
    """What weights come to.

    Args:
        train: the training sequences, a data set behind the other.
    """
    borders = np.cumsum(mixture.rows)[:-1]
    supervised = [float(part.mean()) for part in np.split(train.supervised_tokens, borders)]
    drawn_tokens = [share * mean for share, mean in zip(mixture.shares, supervised, strict=True)]
    by_tokens = (tokens / sum(drawn_tokens) for tokens in drawn_tokens)
    columns = (mixture.names, mixture.shares, by_tokens, mixture.rows, mixture.drawn(sum(mixture.rows)))
    return tuple(MixedPart(*values) for values in zip(*columns, strict=True))
