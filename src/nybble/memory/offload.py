"""What blocks keep for their backward pass, out of the memory that is computed in: PyTorch hands over every tensor that
a block saves, and asks for it in backward (`saved_tensors_hooks`).

On a CPU they go to a file: written as each block ends, read back in reverse. While a block's backward pass is computed,
a thread reads what the block before it kept. The file's pages lie in the system's cache as long as there is room, and
on the disk where there is not. A GPU's go to pinned memory of the host, by copies beside what it computes.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nybble.files.scratch import ScratchFile
from nybble.memory.lane import Event, Lane, lane_to
from nybble.memory.measure import has_own_memory

ALIGNMENT = 64  # bytes; a cache line
MORE_BYTES = 2**26  # of pinned memory at a time, where a plan counted too little


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


@dataclass(eq=False)
class Kept:
    """A tensor that is kept by the host.

    Args:
        number: of those of the micro-batch.
        here: on the device, while it leaves or once it is fetched.
        copied: the end of its copy out, then of the one back.
    """

    number: int
    host: Tensor
    here: Tensor | None
    copied: Event


class PinnedActivations:
    """Takes tensors of a GPU into host memory behind the forward pass, and gives them back, the last first, ahead of
    the backward pass; both beside what is computed. As autograd demands, nobody writes to them meanwhile.

    Args:
        lane: of the copies.
        num_bytes: of the largest micro-batch; taken now, and kept from step to step.
        block_bytes: of what one block keeps: so much still leaves, or is already back, while others are computed.
    """

    def __init__(self, lane: Lane, num_bytes: int, block_bytes: int):
        self._lane, self._block_bytes = lane, block_bytes
        self._pieces = [lane.host_memory(num_bytes)]
        self._last = lane.mark()  # the end of all copies
        self.begin()

    def begin(self) -> None:
        """A new micro-batch: what the last one left is forgotten once its copies are done."""
        self._lane.wait(self._last)
        self._kept: list[Kept] = []
        self._gone = 0  # so many of them, the first, are with the host alone
        self._bytes_here = 0  # of the others, until they are asked for
        self._piece = self._end = 0

    def next_block(self) -> None:
        """Blocks need not be told apart: bytes say how far copies lag."""

    def put(self, tensor: Tensor) -> Kept | Tensor:
        """Send a tensor on its way; one that is no GPU's stays."""
        tensor = tensor.detach()
        if tensor.device.type != self._lane.device.type:
            return tensor
        host = self._room(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        self._last = self._lane.copy(tensor, host, after=self._lane.mark())
        kept = Kept(len(self._kept), host, tensor, self._last)
        self._kept.append(kept)
        self._bytes_here += tensor.nbytes
        while self._bytes_here > self._block_bytes:
            first = self._kept[self._gone]
            self._lane.wait(first.copied)
            first.here = None
            self._bytes_here -= first.host.nbytes
            self._gone += 1
        return kept

    def get(self, kept: Kept | Tensor) -> Tensor:
        """A tensor that `put` took; those before it start on their way back."""
        if isinstance(kept, Tensor):
            return kept
        while self._gone > kept.number:
            self._fetch_last()
        if kept.here is None:  # asked for once more
            self._fetch(kept)
        assert kept.here is not None
        tensor, kept.here = kept.here, None
        self._bytes_here -= tensor.nbytes
        self._lane.wait(kept.copied)
        while self._gone and self._bytes_here + self._kept[self._gone - 1].host.nbytes <= self._block_bytes:
            self._fetch_last()
        return tensor

    def _fetch_last(self) -> None:
        """Fetch the last of those that are with the host alone."""
        self._gone -= 1
        self._fetch(self._kept[self._gone])

    def _fetch(self, kept: Kept) -> None:
        kept.here = self._lane.device_memory(kept.host.nbytes).view(kept.host.dtype).view(kept.host.shape)
        kept.copied = self._last = self._lane.copy(kept.host, kept.here, after=self._lane.mark())
        self._bytes_here += kept.host.nbytes

    def _room(self, num_bytes: int) -> Tensor:
        """Host memory behind what the micro-batch has taken; new where the plan asked for too little."""
        self._end += -self._end % ALIGNMENT
        while self._end + num_bytes > len(self._pieces[self._piece]):
            self._piece, self._end = self._piece + 1, 0
            if self._piece == len(self._pieces):
                self._pieces.append(self._lane.host_memory(max(num_bytes, MORE_BYTES)))
        start, self._end = self._end, self._end + num_bytes
        return self._pieces[self._piece][start : self._end]


def activation_place(
    device: torch.device, folder: Path, num_bytes: int, num_blocks: int
) -> ActivationFile | PinnedActivations:
    """Where what blocks keep on this device goes.

    Args:
        folder, num_bytes: as `ActivationFile` takes them, where it is a file.
        num_blocks: that keep these bytes.

    Raises:
        PlanError: the disk has no room for it.
    """
    if has_own_memory(device):
        return PinnedActivations(lane_to(device), num_bytes, num_bytes // num_blocks)
    return ActivationFile(folder, num_bytes)
