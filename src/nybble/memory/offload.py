"""What blocks keep for their backward pass, out of the memory that is computed in: PyTorch hands over every tensor that
a block saves, and asks for it in backward (`saved_tensors_hooks`).

On a CPU they go to a file: written as each block ends, read back in reverse. While a block's backward pass is computed,
a thread reads what the block before it kept. The file's pages lie in the system's cache as long as there is room, and
on the disk where there is not. A GPU's go to pinned memory of the host.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nybble.files.scratch import ScratchFile
from nybble.memory.measure import has_own_memory


@dataclass(frozen=True)
class Place:
    """Where a tensor went."""

    block: int
    at: int
    shape: torch.Size
    dtype: torch.dtype


class ActivationFile:
    """Takes tensors block by block and gives them back, the last block's first.

    Args:
        folder: on the disk that takes the file.
        num_bytes: of the largest micro-batch; taken now, so that a full disk is found out before the first step.

    Raises:
        PlanError: the disk has no room for it.
    """

    def __init__(self, folder: Path, num_bytes: int):
        self._file = ScratchFile(folder, num_bytes, "What blocks keep", "--offload-activations never")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="nybble-kept")
        self._coming: dict[Place, Future[Tensor]] = {}
        self._blocks: list[list[Place]] = []
        self._end = 0

    def begin(self) -> None:
        """A new micro-batch: what the last one left is overwritten, once nothing reads it any more."""
        for reading in self._coming.values():
            reading.exception()
        self._coming.clear()
        self._blocks.clear()
        self._end = 0

    def next_block(self) -> None:
        """What follows is kept by the next block."""
        self._blocks.append([])

    def put(self, tensor: Tensor) -> Place:
        """Write a tensor at the end of the file.

        Raises:
            OSError: the disk is full or fails.
        """
        place = Place(len(self._blocks) - 1, self._end, tensor.shape, tensor.dtype)
        self._file.write(tensor.contiguous(), self._end)
        self._end += tensor.nbytes
        self._blocks[-1].append(place)
        return place

    def get(self, place: Place) -> Tensor:
        """The tensor that `put` wrote there.

        Raises:
            OSError: the disk fails, or the file ends too soon.
        """
        coming = self._coming.pop(place, None)
        tensor = self._read(place) if coming is None else coming.result()
        if not any(other.block == place.block for other in self._coming) and place.block > 0:
            for ahead in self._blocks[place.block - 1]:
                if ahead not in self._coming:
                    self._coming[ahead] = self._reader.submit(self._read, ahead)
        return tensor

    def _read(self, place: Place) -> Tensor:
        tensor = torch.empty(place.shape, dtype=place.dtype)
        self._file.read(tensor, place.at)
        return tensor


class PinnedActivations:
    """Takes tensors of a GPU into host memory, and gives them back.

    The copies are queued behind what the GPU computes, so that neither side waits; pinned memory is PyTorch's, which
    keeps it from step to step.
    """

    def begin(self) -> None:
        """Nothing is left from one micro-batch to the next: a place is all there is of a tensor."""

    def next_block(self) -> None:
        """Blocks need not be told apart: each tensor is fetched when it is asked for."""

    def put(self, tensor: Tensor) -> tuple[torch.device, Tensor]:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        host.copy_(tensor, non_blocking=True)
        return tensor.device, host

    def get(self, place: tuple[torch.device, Tensor]) -> Tensor:
        device, host = place
        return host.to(device, non_blocking=True)


def activation_place(device: torch.device, folder: Path, num_bytes: int) -> ActivationFile | PinnedActivations:
    """Where what blocks keep on this device goes.

    Args:
        folder, num_bytes: as `ActivationFile` takes them, where it is a file.

    Raises:
        PlanError: the disk has no room for it.
    """
    return PinnedActivations() if has_own_memory(device) else ActivationFile(folder, num_bytes)
