"""Triton's kernels, for NVIDIA and AMD cards: bodies here, the kernels themselves in `jit/`.

Triton is imported by the first call of a body: it takes time, and machines without a card need not have it. With
TRITON_INTERPRET=1 its interpreter runs the kernels on the CPU, very slowly; tests do that.
"""

import importlib.util

import torch

from nybble.kernels import registry
from nybble.kernels.backends.triton import cached_attention as cached_attention
from nybble.kernels.backends.triton import calibration as calibration
from nybble.kernels.backends.triton import decode as decode
from nybble.kernels.backends.triton import four_bit as four_bit
from nybble.kernels.backends.triton import glu as glu
from nybble.kernels.backends.triton import loss as loss
from nybble.kernels.backends.triton import norm as norm
from nybble.kernels.backends.triton import optimizer as optimizer
from nybble.kernels.backends.triton import rope as rope
from nybble.kernels.backends.triton.launch import INTERPRETED

OLDEST = (8, 0)  # compute capability with bf16 arithmetic


def why_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed, PyTorch for CUDA brings it; models' own modules run"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability()) < OLDEST:
        found = ".".join(map(str, capability))
        return f"the card has compute capability {found}, 8.0 is the least; models' own modules run"
    return None


registry.register_backend("triton", devices=("cuda", "cpu") if INTERPRETED else ("cuda",), probe=why_unavailable)
