"""Each op declared once: schema, checks, fake, and the function that callers use. Bodies are in `backends/`."""

from nybble.kernels.ops import (
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
