"""Plain PyTorch, on every device: what other bodies are compared with, and what runs where they are missing."""

from nybble.kernels import registry
from nybble.kernels.backends.reference import (
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

registry.register_backend("reference", devices=None, probe=lambda: None)

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
