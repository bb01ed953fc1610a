"""Which dtype the products run in."""

import functools
import platform
from pathlib import Path

import torch

from nybble.errors import ConfigError

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last is ARM's


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has bf16 products in hardware (AVX512-BF16, AMX, ARM BF16)."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        return any(
            _BF16_FLAGS & set(line.split())
            for line in cpuinfo.read_text().splitlines()
            if line.startswith(("flags", "Features"))
        )
    return platform.system() == "Darwin" and platform.machine() == "arm64"


def resolve_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype for "auto", "bf16" or "fp32": auto is bf16 where the device multiplies it in hardware."""
    if name != "auto":
        return _DTYPES[name]
    has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_multiplies_bf16()
    return torch.bfloat16 if has_bf16 else torch.float32


def resolve_device(name: str) -> torch.device:
    """The torch device for "auto", "cpu" or "cuda".

    Raises:
        ConfigError: cuda was asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device is cuda, but torch sees no CUDA device.", "Allowed here: auto, cpu.", "Use --device cpu."
        )
    return torch.device(name)
