"""The sequences that a run is made of: on the disk, with what everybody asks of them in memory."""

from array import array
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from torch import Tensor

from nybble.data.examples import EncodedExample
from nybble.files.spool import Chosen, Numbered, Spool

COUNTS = 9  # that are kept of each sequence


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
            documents = row.document_lengths
            self._counts.extend((len(row), row.supervised_tokens, row.num_truncated))
            self._counts.extend((row.num_targets, row.shared_tokens, max(documents), len(documents)))
            self._counts.extend((row.picture_values, row.decoded_kib))

    def rows(self, numbers: np.ndarray) -> "EncodedRows":
        """Some of them, in the order of their `numbers`, int64."""
        counts = np.frombuffer(self._counts, dtype=np.int32).reshape(-1, COUNTS)
        return EncodedRows(self.sequences, numbers, counts[numbers])


class EncodedRows(Chosen[EncodedExample]):
    """Sequences that are read from the disk when they are asked for.

    Args:
        numbers: int64, which of `items`.
        counts: int32 `(len(numbers), COUNTS)`: of each its tokens, its supervised targets, the tokens that it lost; its
            targets of all kinds, the tokens that two of its documents share, those of its longest one, its documents;
            values of its pictures' tensors, and KiB of the pictures decoded.
    """

    def __init__(self, items: Sequence[EncodedExample], numbers: np.ndarray, counts: np.ndarray):
        super().__init__(items, numbers)
        self.counts = counts
        self.lengths, self.supervised_tokens, self.num_truncated, *more = np.ascontiguousarray(counts.T)
        self.num_targets, self.shared_tokens, self.longest, self.documents, *pictures = more
        self.picture_values, self.decoded_kib = pictures

    def __add__(self, other: "EncodedRows") -> "EncodedRows":
        """These and, behind them, others of the same file."""
        assert self.items is other.items
        counts = np.concatenate((self.counts, other.counts))
        return EncodedRows(self.items, np.concatenate((self.numbers, other.numbers)), counts)


class ChangedRows(EncodedRows):
    """Sequences that are changed when they are read; what is counted of them stays.

    Args:
        change: makes another of a sequence and its number among these.
    """

    def __init__(self, rows: EncodedRows, change: Callable[[int, EncodedExample], EncodedExample]):
        super().__init__(rows.items, rows.numbers, rows.counts)
        self._rows, self._change = rows, change

    def item(self, number: int) -> EncodedExample:
        """As `Numbered` says."""
        return self._change(number, self._rows[number])


def counted(rows: Sequence[EncodedExample]) -> EncodedRows:
    """The sequences with what is counted of them; those in memory are looked through."""
    if isinstance(rows, EncodedRows):
        return rows
    file = SequenceFile(Spool())
    file.extend(rows)
    return file.rows(np.arange(len(file)))


def lengths_of(rows: Sequence[EncodedExample]) -> np.ndarray:
    """Tokens of each, without reading them where they lie on the disk."""
    return rows.lengths if isinstance(rows, EncodedRows) else np.array([len(row) for row in rows], dtype=np.int32)


def supervised_of(rows: Sequence[EncodedExample]) -> np.ndarray:
    """Supervised targets of each, as `lengths_of`."""
    if isinstance(rows, EncodedRows):
        return rows.supervised_tokens
    return np.array([row.supervised_tokens for row in rows], dtype=np.int32)


class TokenIds(Numbered[Tensor]):
    """The token ids of rows, read when they are asked for."""

    def __init__(self, rows: Sequence[EncodedExample]):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def item(self, number: int) -> Tensor:
        """As `Numbered` says."""
        return self._rows[number].input_ids
