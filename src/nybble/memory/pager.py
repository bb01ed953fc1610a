"""The optimizer's state in a file, in pages that are read ahead, updated, and written behind.

QLoRA's paged optimizers (Dettmers et al. 2023, arXiv 2305.14314, section 3) let CUDA's unified memory move pages
under pressure. Here the order of visits is known, so pages are read one ahead of the update and written one behind it,
by a thread, with at most three in memory; and state of any size is paged, for there is no threshold. Reads and writes
are checked: a disk that fails is an exception in the step that met it.

The file has no name from the start, so that nothing is left of it however the run ends, and all of its space is taken
before the first step, so that a full disk is found out then.
"""

import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from nybble.errors import PlanError

PAGE_BYTES = 2**22  # smaller pages cost a step more in handing over than in copying


@dataclass
class Moments:
    """The state of one parameter: running means of its gradient and of the gradient's square."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


class PagedMoments:
    """Moments of all parameters, zero at first. Iterating reads each, and writes it back when the next is asked for.

    Args:
        shapes: of the parameters.
        folder: on the disk that takes the file.

    Raises:
        PlanError: the disk has no room for the state.
    """

    def __init__(self, shapes: Sequence[torch.Size], folder: Path):
        self._shapes = list(shapes)
        sizes = [8 * prod(shape) for shape in self._shapes]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.num_bytes = sum(sizes)
        self._pages = _pages(sizes)
        try:
            self._file = tempfile.TemporaryFile(dir=folder, prefix=".pages-", buffering=0)  # noqa: SIM115  # closed with us
            os.posix_fallocate(self._file.fileno(), 0, max(1, self.num_bytes))
        except OSError as error:
            raise PlanError(
                f"The optimizer's state takes {self.num_bytes / 1e9:.2f} GB in {folder}: {error.strerror}.",
                fix="Make room on that disk, choose another --out, or add --page-optimizer never.",
            ) from error
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="nybble-pages")

    def __len__(self) -> int:
        return len(self._shapes)

    def __iter__(self) -> Iterator[Moments]:
        written: Future[None] | None = None
        ahead = self._worker.submit(self._read, 0) if self._pages else None
        for number, page in enumerate(self._pages):
            assert ahead is not None
            buffer = ahead.result()
            if written is not None:
                written.result()
            ahead = self._worker.submit(self._read, number + 1) if number + 1 < len(self._pages) else None
            yield from self._moments(buffer, page)
            written = self._worker.submit(self._write, number, buffer)
        if written is not None:
            written.result()

    def views(self) -> list[Moments]:
        """All moments as views of the mapped file, for reading: they take no anonymous memory."""
        mapped = mmap.mmap(self._file.fileno(), self.num_bytes)
        return list(self._moments(torch.frombuffer(mapped, dtype=torch.float32), range(len(self._shapes))))

    def _moments(self, buffer: Tensor, parameters: range) -> Iterator[Moments]:
        """Views of the moments of some parameters that follow each other, in a buffer that begins with the first's."""
        for i in parameters:
            start = (self._starts[i] - self._starts[parameters.start]) // 4
            both = buffer[start : start + 2 * prod(self._shapes[i])].view(2, *self._shapes[i])
            yield Moments(both[0], both[1])

    def _place(self, number: int) -> tuple[int, int]:
        """First byte of a page and its bytes."""
        page = self._pages[number]
        end = self._starts[page.stop] if page.stop < len(self._starts) else self.num_bytes
        return self._starts[page.start], end - self._starts[page.start]

    def _read(self, number: int) -> Tensor:
        at, num_bytes = self._place(number)
        page = torch.empty(num_bytes // 4)
        data = page.view(torch.uint8).numpy().data
        while len(data):
            count = os.preadv(self._file.fileno(), [data], at)
            if count == 0:
                raise OSError(f"the optimizer's pages end at byte {at}")
            data, at = data[count:], at + count
        return page

    def _write(self, number: int, page: Tensor) -> None:
        at, _ = self._place(number)
        data = page.view(torch.uint8).numpy().data
        while len(data):
            count = os.pwrite(self._file.fileno(), data, at)
            data, at = data[count:], at + count


def _pages(sizes: Sequence[int]) -> list[range]:
    """Parameters dealt into pages of about PAGE_BYTES, in order; a larger one has a page of its own."""
    pages, start, filled = [], 0, 0
    for i, size in enumerate(sizes):
        if filled and filled + size > PAGE_BYTES:
            pages.append(range(start, i))
            start, filled = i, 0
        filled += size
    return [*pages, range(start, len(sizes))] if sizes else []
