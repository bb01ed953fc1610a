"""The block store: a streamed base's blocks, read from its 4-bit folder where they are used.

A run visits blocks 0, 1, .. L-1 and in backward L-1, .. 0. Least-recently-used caching keeps nothing useful on such a
scan, so a fixed set of blocks, spread evenly, stays resident, and the others pass through two buffers: one is computed
with while a thread reads the next in the direction of travel into the other. A block's recomputation and backward
share one fetch. Where pages of the folder fit into memory beside the run, the system's file cache keeps them; a GPU's
blocks are kept in pinned memory there, or pass through one pinned buffer on their way from the disk.

Reads are plain `pread`s, not mapped pages: a disk that fails or a file that shrank is an exception in the step that
needed it, before the optimizer touches anything.
"""

import re
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nybble.formats.bnb import StoredWeight
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.formats.safetensors import TensorEntry, read_exactly
from nybble.memory.lane import Lane, lane_to
from nybble.sources.stored_model import StoredModel

ALIGNMENT = 64  # bytes; a cache line
LARGEST_GAP = 2**16  # bytes between two tensors that are read rather than skipped by another call
MOST_PARTS = 500  # of one call; the system takes 1,024


@dataclass(frozen=True)
class StoredLinear:
    """A linear layer of a block: its layout, and the stored tensors it is made of."""

    weight: StoredWeight
    entries: Mapping[str, TensorEntry]


@dataclass(frozen=True)
class Stretch:
    """A part of a file that is read by one call.

    Args:
        parts: (place in the block's buffer, bytes) of what follows each other; None for bytes that nobody wants.
    """

    file: Path
    start: int
    parts: list[tuple[int | None, int]]


class FolderBlockStore:
    """Blocks of a base in a 4-bit folder.

    Args:
        blocks: for each block in order, linear layer's name -> where it is stored.
        num_resident: blocks that stay on the device.
        device: where blocks are computed with.
        in_ram: keep the others in host memory of their own, pinned for a GPU.
        lane: of the copies between the device and its host; the device's own where None.

    Raises:
        ModelError: reading fails, or a file ends too soon.
    """

    def __init__(
        self,
        blocks: Sequence[Mapping[str, StoredLinear]],
        num_resident: int,
        device: torch.device | str = "cpu",
        *,
        in_ram: bool = False,
        lane: Lane | None = None,
    ):
        assert 0 <= num_resident <= len(blocks), (num_resident, len(blocks))
        self._blocks, self.device = blocks, torch.device(device)
        self._block_of = {name: i for i, block in enumerate(blocks) for name in block}
        self._places = [_places(block) for block in blocks]  # of each linear, in its block's buffer
        self._stretches = [_stretches_of(block, places) for block, places in zip(blocks, self._places, strict=True)]
        self._between = memoryview(bytearray(LARGEST_GAP))
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="nybble-blocks")
        self.block_reads = 0
        self._lane = lane_to(self.device) if lane is None else lane
        self._staging = None if self._lane is None else self._host(max(map(self._bytes, range(len(blocks)))))
        self._in_ram: dict[int, Tensor] = {}
        resident = spread(num_resident, len(blocks))
        streamed = [i for i in range(len(blocks)) if i not in resident]
        self._resident: dict[int, Tensor] = {}
        for i in resident:
            room = self._room(self._bytes(i))
            self._bring(i, room)
            self._resident[i] = room.buffer
        for i in streamed if in_ram else ():
            self._in_ram[i] = self._host(self._bytes(i))
            self._read(i, self._in_ram[i])
        largest = max(map(self._bytes, streamed), default=0)
        self._free = [self._room(largest) for _ in streamed[:2]]
        self._current: tuple[int, _Room] | None = None
        self._coming: tuple[int, _Room, Future[None]] | None = None
        self._at, self._forward, self._will_return = 0, True, False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the linear layers whose bytes it has."""
        return tuple(self._block_of)

    def begin(self, *, will_return: bool) -> None:
        self._at, self._forward, self._will_return = 0, True, will_return

    def fetch(self, name: str) -> QuantizedTensor:
        block = self._block_of[name]
        if block < self._at:
            self._forward = False
        self._at = block
        buffer = self._resident.get(block)
        if buffer is None:
            buffer = self._stream(block)
        self._prefetch()
        start, end = self._places[block][name]
        return self._blocks[block][name].weight.view(buffer[start:end])

    def _stream(self, block: int) -> Tensor:
        """The block's bytes in one of the two buffers."""
        if self._current is not None and self._current[0] == block:
            return self._current[1].buffer
        if self._coming is None or self._coming[0] != block:
            self._start(block)
        assert self._coming is not None
        _, room, reading = self._coming
        self._coming = None
        if self._current is not None:
            self._free.append(self._left(self._current[1]))
            self._current = None
        try:
            reading.result()
        except BaseException:
            self._free.append(room)
            raise
        self._current = (block, room)
        return room.buffer

    def _left(self, room: "_Room") -> "_Room":
        """A buffer that nothing more will be asked of; a GPU may still be computing with it."""
        return _Room(room.buffer, self._mark())

    def _prefetch(self) -> None:
        coming = self._next()
        if coming is not None and self._free and self._coming is None:
            self._start(coming)

    def _start(self, block: int) -> None:
        if self._coming is not None:  # the guess was wrong: let it finish, its buffer is needed
            _, room, reading = self._coming
            reading.exception()
            self._coming = None
            self._free.append(room)
        room = self._free.pop()
        self._coming = (block, room, self._reader.submit(self._bring, block, room))

    def _next(self) -> int | None:
        """The next block on the way that has to be read; None when there is only the one at work."""
        last = len(self._blocks) - 1
        onward = range(self._at + 1, last + 1) if self._forward else range(self._at - 1, -1, -1)
        back = range(last, -1, -1) if self._forward and self._will_return else range(last + 1)
        held = self._current[0] if self._current is not None else None
        return next((i for way in (onward, back) for i in way if i not in self._resident and i != held), None)

    def _room(self, num_bytes: int) -> "_Room":
        if self._lane is not None:
            return _Room(self._lane.device_memory(num_bytes), self._mark())
        return _Room(torch.empty(num_bytes, dtype=torch.uint8, device=self.device))

    def _host(self, num_bytes: int) -> Tensor:
        if self._lane is not None:
            return self._lane.host_memory(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    def _mark(self) -> torch.cuda.Event | None:
        return None if self._lane is None else self._lane.mark()

    def _bytes(self, block: int) -> int:
        return max(end for _, end in self._places[block].values())

    def _bring(self, block: int, room: "_Room") -> None:
        """A block's bytes into a buffer on the device."""
        num_bytes = self._bytes(block)
        host = self._in_ram.get(block)
        if host is None:
            host = room.buffer if self._staging is None else self._staging[:num_bytes]
            self._read(block, host)
        self.block_reads += 1
        if host is room.buffer:
            return
        if self._lane is None:
            room.buffer[:num_bytes].copy_(host)
            return
        assert room.in_use is not None
        self._lane.copy(host, room.buffer[:num_bytes], room.in_use)  # arrived: nobody computes with half a block

    def _read(self, block: int, buffer: Tensor) -> None:
        """A block's bytes from its files into host memory."""
        data = buffer.numpy().data
        for stretch in self._stretches[block]:
            parts = [self._between[:length] if at is None else data[at : at + length] for at, length in stretch.parts]
            read_exactly(stretch.file, stretch.start, *parts)
        for name, linear in self._blocks[block].items():
            if linear.weight.offset is not None:
                at = self._places[block][name][0] + linear.weight.packed_bytes
                data[at : at + 4] = struct.pack("=f", linear.weight.offset)


@dataclass(frozen=True)
class _Room:
    """A buffer that blocks pass through.

    Args:
        in_use: until this event a GPU may compute with what is in it, or with what its former owner left there.
    """

    buffer: Tensor
    in_use: torch.cuda.Event | None = None


def open_store(
    source: StoredModel,
    num_resident: int,
    device: torch.device | str = "cpu",
    *,
    in_ram: bool = False,
    lane: Lane | None = None,
) -> FolderBlockStore:
    """The store of a model's blocks.

    Args:
        source: a streamable one.
        num_resident, device, in_ram, lane: as `FolderBlockStore` takes them.

    Raises:
        FormatError, ModelError: a weight is not stored as it is computed with, or cannot be read.
    """
    blocks: dict[str, dict[str, StoredLinear]] = {}
    for name in source.linears:
        block = re.match(r".*?\.\d+\.", name)
        stored = source.stored(source.placements[f"{name}.weight"].name)
        assert block is not None and stored is not None, name
        blocks.setdefault(block.group(), {})[name] = StoredLinear(*stored)
    return FolderBlockStore(list(blocks.values()), num_resident, device, in_ram=in_ram, lane=lane)


def _places(block: Mapping[str, StoredLinear]) -> dict[str, tuple[int, int]]:
    """Where each linear lies in its block's buffer; scales begin at a multiple of four bytes."""
    places, at = {}, 0
    for name, linear in block.items():
        at += -at % ALIGNMENT + -linear.weight.packed_bytes % 4
        places[name] = (at, at + linear.weight.nbytes)
        at += linear.weight.nbytes
    return places


def _stretches_of(block: Mapping[str, StoredLinear], places: Mapping[str, tuple[int, int]]) -> list[Stretch]:
    """What to read for a block: as few calls as its files allow, since the small tensors between are soon read."""
    pieces = sorted(
        (str(linear.entries[part].file), linear.entries[part].start, linear.entries[part].nbytes, places[name][0] + at)
        for name, linear in block.items()
        for part, at in linear.weight.pieces.items()
    )
    stretches: list[Stretch] = []
    end = 0
    for file, start, num_bytes, at in pieces:
        if (
            not stretches
            or str(stretches[-1].file) != file
            or start - end > LARGEST_GAP
            or len(stretches[-1].parts) > MOST_PARTS
        ):
            stretches.append(Stretch(Path(file), start, []))
        elif start > end:
            stretches[-1].parts.append((None, start - end))
        stretches[-1].parts.append((at, num_bytes))
        end = start + num_bytes
    return stretches


def spread(count: int, total: int) -> list[int]:
    """`count` of the numbers below `total`, evenly spread, so that reading hides behind the blocks between."""
    return [i for i in range(total) if (i + 1) * count // total > i * count // total]
