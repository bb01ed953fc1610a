"""A list on the disk: what is too much for memory, appended once and read by its number."""

import os
import pickle
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar, overload

import numpy as np

from nybble.errors import DataError
from nybble.files.disk import reason_of

Item = TypeVar("Item")
KEPT_BYTES = 8 << 20  # of the first items, pickled: these stay in memory as they are, so short lists cost nothing
TAIL_BYTES = 1 << 20  # of the last items, until they are written together


class Numbered(Sequence[Item]):
    """A list whose items are made or read when they are asked for; subclasses say how, and how many there are."""

    def item(self, number: int) -> Item:
        """The item of a number from 0 to `len(self)` - 1."""
        raise NotImplementedError

    @overload
    def __getitem__(self, number: int) -> Item: ...
    @overload
    def __getitem__(self, number: slice) -> list[Item]: ...
    def __getitem__(self, number: int | slice) -> Item | list[Item]:
        if isinstance(number, slice):
            return [self.item(each) for each in range(*number.indices(len(self)))]
        return self.item(range(len(self))[number])

    def __iter__(self) -> Iterator[Item]:
        return map(self.item, range(len(self)))


class Spool(Numbered[Item]):
    """A list whose first items stay in memory; of the others eight bytes each do, the rest is in a file without a name.

    Nothing of the file is left however the process ends. Nothing is mapped, so its pages count as the system's cache.
    Items are pickled: the file is this process's own, and what is read is what was appended.

    Args:
        folder: on the disk that takes the file; the system's folder for temporary files where None.

    Raises:
        DataError: on appending, that the disk is full or fails.
    """

    def __init__(self, folder: Path | None = None):
        self._folder = folder or Path(tempfile.gettempdir())
        self._kept: list[Item] = []
        self._room = KEPT_BYTES
        self._ends = array("Q", [0])  # of the items that are not kept
        self._tail, self._written = bytearray(), 0

    @classmethod
    def of(cls, items: Iterable[Item], folder: Path | None = None) -> "Spool[Item]":
        """A list of these."""
        spool = cls(folder)
        spool.extend(items)
        return spool

    def append(self, item: Item) -> None:
        """Add an item behind the others."""
        data = pickle.dumps(item, protocol=5)
        self._room -= len(data)
        if self._room >= 0:
            self._kept.append(item)
            return
        self._tail += data
        self._ends.append(self._written + len(self._tail))
        if len(self._tail) >= TAIL_BYTES:
            self._write()

    def extend(self, items: Iterable[Item]) -> None:
        """Add items behind the others."""
        for item in items:
            self.append(item)

    def __len__(self) -> int:
        return len(self._kept) + len(self._ends) - 1

    def item(self, number: int) -> Item:
        """As `Numbered` says."""
        index = number - len(self._kept)
        if index < 0:
            return self._kept[index]
        start, end = self._ends[index], self._ends[index + 1]
        if start >= self._written:
            return pickle.loads(memoryview(self._tail)[start - self._written : end - self._written])
        return pickle.loads(os.pread(self._file.fileno(), end - start, start))

    def _write(self) -> None:
        try:
            if not self._written:
                self._file = tempfile.TemporaryFile(dir=self._folder, prefix=".rows-", buffering=0)  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            self._file.seek(self._written)
            left = memoryview(self._tail)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise DataError(
                f"The rows do not go into a file in {self._folder}: {reason_of(error)}.",
                "They are kept on the disk, not in memory.",
                "Make room there, or let TMPDIR (for training, --out) name a folder on another disk.",
            ) from error
        self._written += len(self._tail)
        self._tail = bytearray()


class Chosen(Numbered[Item]):
    """Some items of a list, in an order of their own.

    Args:
        numbers: int64, which.
    """

    def __init__(self, items: Sequence[Item], numbers: np.ndarray):
        self.items, self.numbers = items, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def item(self, number: int) -> Item:
        """As `Numbered` says."""
        return self.items[int(self.numbers[number])]
