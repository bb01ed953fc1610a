"""The C library's heap, where tensors under 32 MiB lie on a CPU.

What is freed there stays with the process, and aligned allocations, as PyTorch's are, reuse little of it: through the
modules of a decoder it grows by several times what is alive.
"""

import ctypes
import sys

import torch
from torch import Tensor


def lies_in_heap(device: torch.device) -> bool:
    """Whether the small tensors of a device do."""
    return device.type == "cpu"


def trim_heap() -> None:
    """Return what the heap holds free to the system, where the library can (glibc).

    What is returned and needed again is paged in again: at every block of a decoder that costs a third of the time.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


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
