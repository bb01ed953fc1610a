"""The optimizer's state in a file, in pages that are read ahead, updated, and written behind.

QLoRA's paged optimizers (Dettmers et al. 2023, arXiv 2305.14314, section 3) let CUDA's unified memory move pages
under pressure. Here the order of visits is known, so a thread reads one page ahead of the update and writes one behind
it, in three buffers; and state of any size is paged, for there is no threshold. The thread does one thing after the
other, in the order asked for: a buffer that is read into again has been written before. Buffers lie where the
parameters do; a GPU's are filled and emptied through one pinned page of host memory (memory/lane.py).

A disk that fails is an exception in the step that met it: parameters are then half updated, and the run ends without
saving them.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from nybble.files.scratch import ScratchFile
from nybble.memory.lane import Event, Lane, lane_to
from nybble.sizes import PAGE_BUFFERS, PAGE_BYTES

ALIGNMENT = 64  # bytes; a cache line

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # of one parameter's state: name -> type and shape
State = dict[str, Tensor]


class PagedState:
    """State of all parameters in a file, zeros at first.

    Iterating reads the state of each parameter in turn, and writes it back once the next is asked for; one has to come
    to the end (`zip(.., strict=True)` does), else what was not written is lost.

    Args:
        layouts: of each parameter's state.
        folder: on the disk that takes the file.
        device: where the state is updated.
        lane: of the copies between the device and its host; the device's own where None.

    Raises:
        PlanError: the disk has no room for the state.
        OSError: while iterating, the disk fails.
    """

    def __init__(
        self, layouts: Sequence[Layout], folder: Path, device: torch.device | str = "cpu", *, lane: Lane | None = None
    ):
        self._layouts, self._device = list(layouts), torch.device(device)
        sizes = [layout_bytes(layout) for layout in self._layouts]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self._pages = deal_into_pages(sizes)
        self._largest = max(map(self._bytes, self._pages), default=0)
        self._lane = lane_to(self._device) if lane is None else lane
        # Kept from step to step: freed, they would leave gaps that what a forward pass keeps begins to fill.
        self._buffers = [self._lane.device_memory(self._largest) for _ in self._pages[:PAGE_BUFFERS]]
        self._file = ScratchFile(folder, self.num_bytes, "The optimizer's state", "--page-optimizer never")
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="nybble-pages")

    @property
    def num_bytes(self) -> int:
        return self._starts[-1]

    def __len__(self) -> int:
        return len(self._layouts)

    def __iter__(self) -> Iterator[State]:
        return self._pass(write=True)

    def reading(self) -> Iterator[State]:
        """The state of each parameter, valid until the next is asked for; nothing is written back."""
        return self._pass(write=False)

    def _pass(self, write: bool) -> Iterator[State]:
        buffers = self._buffers  # a GPU may compute with what is in them up to the mark
        coming = [self._worker.submit(self._read, page, buffers[0], self._lane.mark()) for page in self._pages[:1]]
        written: Future[None] | None = None
        for number, page in enumerate(self._pages):
            self._lane.wait(coming.pop().result())
            for following in self._pages[number + 1 : number + 2]:
                there = buffers[(number + 1) % PAGE_BUFFERS]
                coming.append(self._worker.submit(self._read, following, there, self._lane.mark()))
            here = buffers[number % PAGE_BUFFERS]
            for i in page:
                yield self._state(here, i, page)
            if written is not None:
                written.result()
            written = self._worker.submit(self._write, page, here, self._lane.mark()) if write else None
        if written is not None:
            written.result()

    def _state(self, buffer: Tensor, parameter: int, page: range) -> State:
        """Views of one parameter's state in the buffer that holds its page."""
        state, at = {}, self._starts[parameter] - self._starts[page.start]
        for name, (dtype, shape) in self._layouts[parameter].items():
            end = at + prod(shape) * dtype.itemsize
            state[name] = buffer[at:end].view(dtype).view(shape)
            at = end + -end % ALIGNMENT
        return state

    def _bytes(self, page: range) -> int:
        return self._starts[page.stop] - self._starts[page.start]

    def _read(self, page: range, buffer: Tensor, in_use: Event) -> Event:
        start = self._starts[page.start]
        return self._lane.fill(buffer[: self._bytes(page)], lambda host: self._file.read(host, start), in_use)

    def _write(self, page: range, buffer: Tensor, updated: Event) -> None:
        start = self._starts[page.start]
        self._lane.drain(buffer[: self._bytes(page)], lambda host: self._file.write(host, start), updated)


def layout_bytes(layout: Layout) -> int:
    """What the state takes in the file."""
    sizes = [prod(shape) * dtype.itemsize for dtype, shape in layout.values()]
    return sum(size + -size % ALIGNMENT for size in sizes)


def deal_into_pages(sizes: Sequence[int]) -> list[range]:
    """Parameters dealt into pages of about PAGE_BYTES, in order; a larger one has a page of its own."""
    pages, start, filled = [], 0, 0
    for i, size in enumerate(sizes):
        if filled and filled + size > PAGE_BYTES:
            pages.append(range(start, i))
            start, filled = i, 0
        filled += size
    return [*pages, range(start, len(sizes))] if sizes else []
