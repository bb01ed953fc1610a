"""Copies between a GPU's memory and its host's, on a stream of their own beside what the GPU computes.

A GPU comes to a kernel long after it was asked for: memory that a kernel was given may be read or written until an
event that was recorded after it, and nothing has arrived before the event of its copy. So every copy names the event
after which its source is complete and its target free, even if that was only just allocated: PyTorch hands out what its
former owner's kernels may still be writing. What is computed with the copied waits for the copy's event, and until that
was waited for nobody may write to the source or let go of either. A GPU waits for events by itself; its host goes on.
"""

import mmap
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from nybble.memory.measure import has_own_memory


class Event(Protocol):
    """The end of what was asked for up to some point."""

    def synchronize(self) -> None:
        """Wait for it here, on the host."""


class Lane(ABC):
    """Copies to and from a device, in the order that they are asked for; by one thread at a time.

    Args:
        device: whose memory it is.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._staged: Event | None = None  # the last copy from there

    @abstractmethod
    def host_memory(self, num_bytes: int) -> Tensor:
        """Memory of the host that copies reach directly, uint8 `(num_bytes)`."""

    @abstractmethod
    def device_memory(self, num_bytes: int) -> Tensor:
        """Memory of the device, uint8 `(num_bytes)`; free for a copy after the next `mark`."""

    @abstractmethod
    def mark(self) -> Event:
        """The end of all that this thread has asked the device to compute so far."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Let what this thread asks the device to compute from now on come after `event`."""

    @abstractmethod
    def copy(self, source: Tensor, target: Tensor, after: Event) -> Event:
        """Copy once `after` is past.

        Returns:
            The end of this copy, and of all before it.
        """

    def fill(self, target: Tensor, read: Callable[[Tensor], None], after: Event) -> Event:
        """Copy what `read` fills host memory with, uint8 `(N)` as the target; waits for it, and not for the copy."""
        host = self._stage(len(target))
        read(host)
        self._staged = self.copy(host, target, after)
        return self._staged

    def drain(self, source: Tensor, write: Callable[[Tensor], None], after: Event) -> None:
        """Let `write` have a copy in host memory of the source, uint8 `(N)`; waits for both."""
        host = self._stage(len(source))
        self.copy(source, host, after).synchronize()
        write(host)

    def _stage(self, num_bytes: int) -> Tensor:
        """Host memory, once the copy from there before is done."""
        if self._staged is not None:
            self._staged.synchronize()
        if len(self._staging) < num_bytes:
            self._staging = self.host_memory(num_bytes)
        return self._staging[:num_bytes]


class _Past:
    def synchronize(self) -> None:
        pass


class HostLane(Lane):
    """Of a device that computes in its host's own memory: all is done at once, and what is read needs no copy."""

    def host_memory(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    device_memory = host_memory

    def mark(self) -> Event:
        return _Past()

    def wait(self, event: Event) -> None:
        pass

    def copy(self, source: Tensor, target: Tensor, after: Event) -> Event:
        target.copy_(source)
        return _Past()

    def fill(self, target: Tensor, read: Callable[[Tensor], None], after: Event) -> Event:
        read(target)
        return _Past()

    def drain(self, source: Tensor, write: Callable[[Tensor], None], after: Event) -> None:
        write(source)


class CudaLane(Lane):
    """Of a GPU."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)

    def host_memory(self, num_bytes: int) -> Tensor:
        return _pinned(num_bytes)

    def device_memory(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        torch.cuda.current_stream(self.device).wait_event(event)

    def copy(self, source: Tensor, target: Tensor, after: Event) -> torch.cuda.Event:
        assert isinstance(after, torch.cuda.Event)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()


def lane_to(device: torch.device) -> Lane:
    """A lane of its own to a device."""
    return CudaLane(device) if has_own_memory(device) else HostLane(device)


class _Registered(mmap.mmap):
    """Pages of the host that CUDA has pinned, until they are freed."""

    address = 0

    def __del__(self) -> None:
        if self.address:
            torch.cuda.cudart().cudaHostUnregister(self.address)


def _pinned(num_bytes: int) -> Tensor:
    """Pinned memory of just this size, uint8; PyTorch's own, up to twice as much, where CUDA registers none."""
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    pages = _Registered(-1, num_bytes)
    memory = torch.frombuffer(pages, dtype=torch.uint8)  # holds the pages
    error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0))
    if error:
        warnings.warn(f"CUDA pins no {num_bytes / 1e9:.2f} GB in place (error {error}); PyTorch does", stacklevel=2)
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    pages.address = memory.data_ptr()
    return memory
