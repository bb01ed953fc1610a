"""jit/loss.py."""

import torch
from torch import Tensor

from nybble.kernels import registry
from nybble.kernels.backends.triton.launch import INTERPRETED, MAX_WARPS, launch, power_of_two

COLUMNS = 512 if INTERPRETED else 4096  # at once


@registry.register("cross_entropy_", "triton")
def cross_entropy_(logits: Tensor, targets: Tensor, gradient_scale: Tensor) -> Tensor:
    from nybble.kernels.backends.triton.jit.loss import cross_entropy_kernel

    (rows, vocabulary), losses = logits.shape, torch.empty_like(targets, dtype=torch.float32)
    launch(
        cross_entropy_kernel, rows, logits, targets, losses, vocabulary, logits.stride(0), gradient_scale,
        COLUMNS=min(power_of_two(vocabulary), COLUMNS), num_warps=MAX_WARPS,
    )  # fmt: skip
    return losses
