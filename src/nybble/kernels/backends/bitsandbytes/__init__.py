"""bitsandbytes' CUDA kernels."""

import importlib.util

import torch

from nybble.kernels import registry
from nybble.kernels.backends.bitsandbytes import four_bit as four_bit


def _why_unavailable() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    return None


registry.register_backend("bitsandbytes", devices=("cuda",), probe=_why_unavailable)
