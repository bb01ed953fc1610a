"""What the hardware of a device can do."""

import functools
import platform
from pathlib import Path

import torch

_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last is ARM's


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has bf16 products in hardware."""
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_multiplies_bf16()


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    """Whether the CPU has bf16 products in hardware (AVX512-BF16, AMX, ARM BF16)."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        return any(
            _BF16_FLAGS & set(line.split())
            for line in cpuinfo.read_text().splitlines()
            if line.startswith(("flags", "Features"))
        )
    return platform.system() == "Darwin" and platform.machine() == "arm64"
