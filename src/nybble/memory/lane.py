"""Copies between a GPU's memory and its host's, on a stream of their own beside what the GPU computes.

A kernel runs when its stream comes to it, long after it was asked for: a buffer that computation was given may be read
or written until an event that was recorded after it. So every copy names the event after which its target is free and
its source complete. Nothing is free that has no event, not even memory that was only just allocated: PyTorch hands out
what its former owner's kernels may still be writing.
"""

import torch
from torch import Tensor

from nybble.memory.measure import has_own_memory


class Lane:
    """A GPU's copies.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def host_memory(self, num_bytes: int) -> Tensor:
        """Memory of the host that copies reach directly, uint8 `(num_bytes)`."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def device_memory(self, num_bytes: int) -> Tensor:
        """Memory of the GPU, uint8 `(num_bytes)`; free for a copy after the next `mark`."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def mark(self) -> torch.cuda.Event:
        """The end of all that this thread has given the GPU to compute so far."""
        return torch.cuda.current_stream(self.device).record_event()

    def copy(self, source: Tensor, target: Tensor, after: torch.cuda.Event) -> None:
        """Copy once `after` is past; the bytes have arrived when this returns. May be called by any thread."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
        self._stream.synchronize()


def lane_to(device: torch.device) -> Lane | None:
    """The lane of a GPU; None for a CPU, whose memory needs no copies."""
    return Lane(device) if has_own_memory(device) else None
