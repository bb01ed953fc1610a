"""The C library's heap, where tensors under 32 MiB lie on a CPU that have no slab (`kernels/slabs.py`).

What is freed there stays with the process, and aligned allocations, as PyTorch's are, reuse little of it: through the
modules of a decoder it grows by several times what is alive.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from nybble.kernels.slabs import release_slabs, slabs_in_use
from nybble.sizes import BESIDE_SLABS_FROM, MAPPED_FROM

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def lies_in_heap(device: torch.device) -> bool:
    """Whether the small tensors of a device do."""
    return device.type == "cpu"


def trim_heap() -> None:
    """Return what the heap and slabs hold free to the system, where the library can (glibc).

    What is returned and needed again is paged in again: at every block of a decoder that costs a third of the time.
    """
    release_slabs()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextmanager
def kept_heap(keep: bool, *, slabs: bool) -> Iterator[None]:
    """Within the block what is freed at the heap's end stays with the process, but for `trim_heap`; where the library
    can (glibc).

    Left to itself it returns what is more than 64 MiB. A step that keeps what its blocks compute then pages it all in
    again: 99,000 pages a step of 1,900 tokens of SmolLM2-135M, a twelfth of its time.

    Args:
        keep: without it nothing is changed.
        slabs: large tensors of decoder blocks lie in these, so that what is large beside them, which comes seldom, may
            be mapped by itself.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if keep and sys.platform == "linux" else None
    if set_option is None:
        yield
        return
    # a threshold that is set stops both from following what is freed
    set_option(_M_MMAP_THRESHOLD, BESIDE_SLABS_FROM if slabs else MAPPED_FROM)
    set_option(_M_TRIM_THRESHOLD, -1)
    try:
        with slabs_in_use() if slabs else nullcontext():
            yield
    finally:
        set_option(_M_MMAP_THRESHOLD, MAPPED_FROM)
        set_option(_M_TRIM_THRESHOLD, 2 * MAPPED_FROM)
        trim_heap()


class TrimmedHeap:
    """Hooks for tensors that are saved for backward (`saved_tensors_hooks`): leaves them where they are, and returns
    what is free to the system whenever so many have passed.

    Without it the free pieces between blocks' inputs came to four times what was alive (135M, 1,024 tokens).

    Args:
        every: tensors between two returns.
    """

    def __init__(self, every: int):
        self.every, self._count = every, 0

    def begin(self) -> None:
        """Begin a new micro-batch."""
        self._count = 0

    def next_block(self) -> None:
        """What follows is kept by the next block: nothing to do."""

    def put(self, tensor: Tensor) -> Tensor:
        self._count += 1
        if self._count % self.every == 0:
            trim_heap()
        return tensor.detach()  # the tensor itself would hold the graph that holds it

    get = put
