"""Which dtype the products run in."""

import torch

from nybble.errors import ConfigError
from nybble.kernels.hardware import multiplies_bf16

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def resolve_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype for "auto", "bf16" or "fp32": auto is bf16 where the device multiplies it in hardware."""
    if name != "auto":
        return _DTYPES[name]
    return torch.bfloat16 if multiplies_bf16(device) else torch.float32


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
