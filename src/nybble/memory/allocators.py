"""What the allocators of GPUs tell of their memory, in the names of `torch.cuda` and `torch.xpu`."""

from typing import Any

import torch

KEEPS_NO_PEAK = ("mps",)


class AppleAllocator:
    """Of an Apple GPU, whose memory is the machine's; it takes no more of that than PyTorch recommends."""

    @staticmethod
    def memory_allocated(device: torch.device) -> int:
        """Bytes of tensors."""
        return torch.mps.current_allocated_memory()

    @staticmethod
    def memory_reserved(device: torch.device) -> int:
        """Bytes that the driver gave, gaps included."""
        return torch.mps.driver_allocated_memory()

    @staticmethod
    def mem_get_info(device: torch.device) -> tuple[int, int]:
        """Free bytes, and all of them."""
        total = torch.mps.recommended_max_memory()
        return max(0, total - torch.mps.driver_allocated_memory()), total

    @staticmethod
    def empty_cache() -> None:
        """Give back what no tensor uses."""
        torch.mps.empty_cache()

    @staticmethod
    def synchronize(device: torch.device) -> None:
        """Wait until all that was asked of it is done."""
        torch.mps.synchronize()

    @staticmethod
    def get_rng_state(device: torch.device) -> torch.Tensor:
        """Of its generator, uint8."""
        return torch.mps.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: torch.device) -> None:
        """Put its generator there."""
        torch.mps.set_rng_state(state)


def allocator(device: torch.device) -> Any:
    """PyTorch's module for a GPU, or what stands for it on Apple's."""
    return AppleAllocator if device.type == "mps" else torch.get_device_module(device)
