"""The C++ kernels of csrc/, for CPUs."""

from nybble.kernels import registry
from nybble.kernels.backends.cpp import (
    attention,
    cached_attention,
    calibration,
    decode,
    four_bit,
    glu,
    loss,
    norm,
    optimizer,
    rope,
)
from nybble.kernels.backends.cpp.library import why_unavailable

registry.register_backend("cpp", devices=("cpu",), probe=why_unavailable)

__all__ = [
    "attention",
    "cached_attention",
    "calibration",
    "decode",
    "four_bit",
    "glu",
    "loss",
    "norm",
    "optimizer",
    "rope",
]
