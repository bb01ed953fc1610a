"""Memory for the large tensors of a step on a CPU: mappings that are kept, and used again by the next tensors.

Left to the C library, large tensors either lie in its heap, where what is freed fits no other aligned piece of its size
and half as much again is lost to gaps, or have mappings of their own, whose pages are made anew each time: a fifth of a
step at a width of 1,152 (lab notes). Slabs have neither. There are never more bytes of them than tensors once took at
the same time, and their pages are huge where the system has such, which products read and write faster.
"""

import math
import mmap
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from nybble.sizes import SLABS_FROM

_LOOSE = 1.125  # a slab is used for what takes this part of it or more
_HUGE_PAGE = 2**21
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)


@dataclass(eq=False)
class _Slab:
    """`size` bytes from `start` on of a mapping, of which no more are ever touched."""

    mapping: mmap.mmap
    start: int
    size: int

    @classmethod
    def mapped(cls, size: int) -> "_Slab":
        """A new one, which starts where a huge page may.

        Raises:
            MemoryError: the system has no more.
        """
        try:
            mapping = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{size} bytes could not be mapped: {error.strerror}") from error
        start = -torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() % _HUGE_PAGE
        whole = size // _HUGE_PAGE * _HUGE_PAGE  # the rest would fill another huge page
        if _ADVICE is not None and whole:
            mapping.madvise(_ADVICE, start, whole)
        return cls(mapping, start, size)


class Slabs:
    """What `empty` takes its memory from. Threads may share it."""

    def __init__(self) -> None:
        self._free: list[_Slab] = []  # the one that was last in use comes last
        self._left: deque[_Slab] = deque()  # their tensors are gone, in whatever thread that was
        self._lock = threading.Lock()
        self._in_use = self._highest = 0

    @property
    def num_bytes(self) -> int:
        """Of all slabs that there are."""
        with self._lock:
            self._collect()
            return self._in_use + sum(slab.size for slab in self._free)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of that shape, its values undefined, on the CPU; its memory is used again once nothing refers to it.

        Args:
            shape: of one element at least.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            slab = self._take(num_bytes)
        loan = memoryview(slab.mapping)[slab.start : slab.start + num_bytes]
        weakref.finalize(loan, self._left.append, slab).atexit = False
        return torch.frombuffer(loan, dtype=dtype).view(tuple(shape))

    def release(self) -> None:
        """Return what no tensor uses to the system."""
        with self._lock:
            self._collect()
            self._free.clear()
            self._highest = self._in_use

    def _take(self, num_bytes: int) -> _Slab:
        self._collect()
        fitting = [slab for slab in self._free if num_bytes <= slab.size <= _LOOSE * num_bytes]
        if fitting:
            slab = min(reversed(fitting), key=lambda slab: slab.size)  # of equal ones the last, which caches still hold
            self._free.remove(slab)
        else:
            self._make_room(num_bytes)
            slab = _Slab.mapped(num_bytes)
        self._in_use += slab.size
        self._highest = max(self._highest, self._in_use)
        return slab

    def _collect(self) -> None:
        """Those that were left are free."""
        while self._left:
            slab = self._left.popleft()
            self._in_use -= slab.size
            self._free.append(slab)

    def _make_room(self, num_bytes: int) -> None:
        """Give back those that were free for longest, until with another of so many bytes there are no more of them
        than were once in use.
        """
        allowed = max(self._highest - self._in_use - num_bytes, 0)
        last_first = accumulate(slab.size for slab in reversed(self._free))
        kept = sum(total <= allowed for total in last_first)
        del self._free[: len(self._free) - kept]


_slabs: Slabs | None = None


@contextmanager
def slabs_in_use() -> Iterator[None]:
    """Within the block `empty` takes large tensors on a CPU from slabs, where the system has what they need (Linux)."""
    global _slabs
    outer, _slabs = _slabs, Slabs() if sys.platform == "linux" else None
    try:
        yield
    finally:
        _slabs = outer


def release_slabs() -> None:
    """Return those that no tensor uses to the system, where there are any."""
    if _slabs is not None:
        _slabs.release()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor as `torch.empty` makes it, of a slab where these are in use and it is large."""
    slabs = _slabs
    if slabs is None or device.type != "cpu" or math.prod(shape) * dtype.itemsize < SLABS_FROM:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return slabs.empty(shape, dtype)


def empty_like(tensor: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """The same with a tensor's dtype and device, and its shape, where no other is said; its rows are not apart."""
    return empty(tensor.shape if shape is None else shape, dtype or tensor.dtype, tensor.device)


def rows_at(tensor: Tensor, places: Tensor) -> Tensor:
    """The rows of a tensor `(T, ..)` at these places, int64 `(N)`: `(N, ..)`, without autograd."""
    found = empty_like(tensor, (len(places), *tensor.shape[1:]))
    return torch.index_select(tensor, 0, places, out=found)


def copy_of(tensor: Tensor) -> Tensor:
    """A tensor's values in memory of their own, whose rows are not apart."""
    return empty_like(tensor).copy_(tensor)
