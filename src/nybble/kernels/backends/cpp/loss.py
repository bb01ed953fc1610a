"""csrc/cross_entropy.cpp."""

import torch
from torch import Tensor

from nybble.kernels import registry
from nybble.kernels.backends.cpp.library import (
    DTYPES,
    FLOAT,
    INT,
    INT64,
    POINTER,
    ROWS,
    function,
    no_fp16,
    pointer,
    rows,
)
from nybble.kernels.ops.loss import check_targets

_cross_entropy = function("cross_entropy", *ROWS, INT, POINTER, INT64, INT64, FLOAT, POINTER)


@registry.register("cross_entropy_", "cpp", unsupported=no_fp16)
def cross_entropy_(logits: Tensor, targets: Tensor, gradient_scale: Tensor) -> Tensor:
    check_targets(targets, logits.shape[1])
    losses = torch.empty(logits.shape[0])
    _cross_entropy(
        *rows(logits), DTYPES[logits.dtype], pointer(targets), *logits.shape, gradient_scale.item(), pointer(losses)
    )
    return losses
