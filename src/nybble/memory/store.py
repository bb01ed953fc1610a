"""The block store: a streamed base's blocks, read from its 4-bit folder or GGUF file where they are used.

A run visits blocks 0, 1, .. L-1 and in backward L-1, .. 0. Least-recently-used caching keeps nothing useful on such a
scan, so a fixed set of blocks, spread evenly, stays resident, and the others pass through a few buffers: one is
computed with while a thread reads those that are visited next into the others. A block's recomputation and backward
share one fetch. Where pages of the folder fit into memory beside the run, the system's file cache keeps them; a GPU's
blocks are kept in pinned memory there, or pass through one pinned buffer on their way from the disk, and the GPU itself
waits for their copies (memory/lane.py).

Reads are plain `pread`s, not mapped pages: a disk that fails or a file that shrank is an exception in the step that
needed it, before the optimizer touches anything.
"""

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nybble.formats.bnb import StoredWeight
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.formats.rotary_rows import restored
from nybble.formats.safetensors import TensorEntry, read_exactly
from nybble.layers.streamed import expert_name
from nybble.memory.lane import Event, Lane, lane_to
from nybble.sizes import SHAPE_RULES
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
    """Blocks of a base in a 4-bit folder, or in a GGUF file's own blocks.

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
        self._in_ram: dict[int, Tensor] = {}
        self._resident: dict[int, Tensor] = {}
        for i in spread(num_resident, len(blocks)):
            self._resident[i] = self._lane.device_memory(self._bytes(i))
            self._lane.wait(self._bring(i, self._resident[i], self._lane.mark()))
        streamed = [i for i in range(len(blocks)) if i not in self._resident]
        for i in streamed if in_ram else ():
            self._in_ram[i] = self._lane.host_memory(self._bytes(i))
            self._read(i, self._in_ram[i])
        largest = max(map(self._bytes, streamed), default=0)
        self._num_buffers = min(len(streamed), SHAPE_RULES[self.device.type].block_buffers)
        self._free = [self._lane.device_memory(largest) for _ in range(self._num_buffers)]
        self._coming: dict[int, tuple[Tensor, Future[Event]]] = {}  # and what has come, the block at work included
        self._at: int | None = None
        self._buffer = torch.empty(0)  # of the block at work
        self._forward, self._will_return = True, False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the linear layers whose bytes it has."""
        return tuple(self._block_of)

    def begin(self, *, will_return: bool) -> None:
        self._at, self._forward, self._will_return = None, True, will_return

    def fetch(self, name: str) -> QuantizedTensor:
        block = self._block_of[name]
        if block != self._at:
            self._enter(block)
        start, end = self._places[block][name]
        return self._blocks[block][name].weight.view(self._buffer[start:end])

    def _enter(self, block: int) -> None:
        """Leave the block at work for another; those that follow it are on their way as far as buffers go."""
        if self._at is not None and block < self._at:
            self._forward = False
        self._at = None  # until the other is there
        self._prefetch(block)
        if block in self._resident:
            self._buffer = self._resident[block]
        else:
            self._buffer, coming = self._coming[block]
            try:
                arrived = coming.result()
            except BaseException:
                self._free.append(self._coming.pop(block)[0])
                raise
            self._lane.wait(arrived)
        self._at = block

    def _prefetch(self, block: int) -> None:
        """Fill buffers with what is visited from `block` on; those with anything else are free for it."""
        wanted = [i for i in dict.fromkeys(self._visits(block)) if i not in self._resident][: self._num_buffers]
        for i in self._coming.keys() - wanted:
            self._free.append(self._coming.pop(i)[0])
        for i in wanted:
            if i not in self._coming:
                buffer = self._free.pop()
                self._coming[i] = buffer, self._reader.submit(self._bring, i, buffer, self._lane.mark())

    def _visits(self, block: int) -> Iterator[int]:
        """Blocks in the order that they are visited in, from `block` to the end of the pass after it."""
        last = len(self._blocks) - 1
        yield from range(block, last + 1) if self._forward else range(block, -1, -1)
        if self._forward and self._will_return:
            yield from range(last, -1, -1)
        yield from range(last + 1)

    def _bytes(self, block: int) -> int:
        return max(end for _, end in self._places[block].values())

    def _bring(self, block: int, buffer: Tensor, free: Event) -> Event:
        """A block's bytes into a buffer on the device; until `free` it may still be computed with."""
        target = buffer[: self._bytes(block)]
        self.block_reads += 1
        if block in self._in_ram:
            return self._lane.copy(self._in_ram[block], target, free)
        return self._lane.fill(target, partial(self._read, block), free)

    def _read(self, block: int, buffer: Tensor) -> None:
        """A block's bytes from its files into host memory."""
        data = buffer.numpy().data
        for stretch in self._stretches[block]:
            parts = [self._between[:length] if at is None else data[at : at + length] for at, length in stretch.parts]
            read_exactly(stretch.file, stretch.start, *parts)
        for name, linear in self._blocks[block].items():
            start = self._places[block][name][0]
            end = start + linear.weight.packed_bytes
            if linear.weight.offset is not None:
                data[end : end + 4] = struct.pack("=f", linear.weight.offset)
            if heads := linear.weight.interleaved_heads:
                for head in buffer[start:end].view(heads, linear.weight.shape[0] // heads, -1):
                    head.copy_(restored(head, 1))  # one by one: a copy of each is made


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
    for name, stored in _stored_weights(source):
        block = re.match(r".*?\.\d+\.", name)
        assert block is not None and stored is not None, name
        blocks.setdefault(block.group(), {})[name] = StoredLinear(*stored)
    return FolderBlockStore(list(blocks.values()), num_resident, device, in_ram=in_ram, lane=lane)


def _stored_weights(
    source: StoredModel,
) -> Iterator[tuple[str, tuple[StoredWeight, Mapping[str, TensorEntry]] | None]]:
    """Linear layers and experts by the names that layers ask for them by, and where each is stored."""
    for name in source.streamed_layers:
        if name not in source.experts:
            yield name, source.stored(source.placements[f"{name}.weight"].name)
    for stack in source.streamed_layers:
        for index in range(source.experts[stack].num if stack in source.experts else 0):
            yield expert_name(stack, index), source.stored_expert(source.placements[stack].name, index)


def _places(block: Mapping[str, StoredLinear]) -> dict[str, tuple[int, int]]:
    """Where each linear lies in its block's buffer; scales begin at a multiple of four bytes."""
    places, at = {}, 0
    for name, linear in block.items():
        has_scales = linear.weight.nbytes > linear.weight.packed_bytes
        at += -at % ALIGNMENT + (-linear.weight.packed_bytes % 4 if has_scales else 0)
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
