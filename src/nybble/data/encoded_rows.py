"""The sequences that a run is made of: on the disk, with what everybody asks of them in memory."""

from array import array
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
from torch import Tensor

from nybble.data.examples import EncodedExample
from nybble.files.spool import Chosen, Spool


class SequenceFile:
    """Sequences as they are encoded, appended once.

    Attributes:
        sequences: all of them.
    """

    def __init__(self, sequences: Spool[EncodedExample]):
        self.sequences = sequences
        self._counts = array("i")

    def __len__(self) -> int:
        return len(self.sequences)

    def extend(self, rows: Iterable[EncodedExample]) -> None:
        """Add sequences behind the others."""
        for row in rows:
            self.sequences.append(row)
            self._counts.extend((len(row), row.supervised_tokens, row.num_truncated))

    def rows(self, numbers: np.ndarray) -> "EncodedRows":
        """Some of them, in the order of their `numbers`, int64."""
        counts = np.frombuffer(self._counts, dtype=np.int32).reshape(-1, 3)
        return EncodedRows(self.sequences, numbers, counts[numbers])


class EncodedRows(Chosen[EncodedExample]):
    """Sequences that are read from the disk when they are asked for.

    Args:
        numbers: int64, which of `items`.
        counts: int32 `(len(numbers), 3)`: of each its tokens, its supervised targets, and the tokens that it lost.
    """

    def __init__(self, items: Sequence[EncodedExample], numbers: np.ndarray, counts: np.ndarray):
        super().__init__(items, numbers)
        self.lengths, self.supervised_tokens, self.num_truncated = np.ascontiguousarray(counts.T)

    def __add__(self, other: "EncodedRows") -> "EncodedRows":
        """These and, behind them, others of the same file."""
        assert self.items is other.items
        counts = [np.stack((rows.lengths, rows.supervised_tokens, rows.num_truncated), 1) for rows in (self, other)]
        return EncodedRows(self.items, np.concatenate((self.numbers, other.numbers)), np.concatenate(counts))


def lengths_of(rows: Sequence[EncodedExample]) -> np.ndarray:
    """Tokens of each, without reading them where they lie on the disk."""
    return rows.lengths if isinstance(rows, EncodedRows) else np.array([len(row) for row in rows], dtype=np.int32)


def supervised_of(rows: Sequence[EncodedExample]) -> np.ndarray:
    """Supervised targets of each, as `lengths_of`."""
    if isinstance(rows, EncodedRows):
        return rows.supervised_tokens
    return np.array([row.supervised_tokens for row in rows], dtype=np.int32)


class TokenIds(Sequence[Tensor]):
    """The token ids of rows, read when they are asked for."""

    def __init__(self, rows: Sequence[EncodedExample]):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, number: int) -> Tensor: ...
    @overload
    def __getitem__(self, number: slice) -> list[Tensor]: ...
    def __getitem__(self, number: int | slice) -> Tensor | list[Tensor]:
        if isinstance(number, slice):
            return [row.input_ids for row in self._rows[number]]
        return self._rows[number].input_ids
