"""csrc/rms_norm.cpp and csrc/layer_norm.cpp."""

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
    sizes,
)

_rms_norm = function("rms_norm", *ROWS, INT, POINTER, INT, FLOAT, FLOAT, INT64, INT64, INT64, *ROWS, POINTER)
_rms_norm_backward = function(
    "rms_norm_backward", *ROWS, *ROWS, INT, POINTER, INT, FLOAT, POINTER, INT64, INT64, INT64, *ROWS, INT
)

_layer_norm = function("layer_norm", *ROWS, INT, POINTER, POINTER, INT, FLOAT, INT64, INT64, INT64, *ROWS, POINTER)
_layer_norm_backward = function(
    "layer_norm_backward", *ROWS, *ROWS, INT, POINTER, INT, POINTER, INT64, INT64, INT64, *ROWS, INT
)


@registry.register("rms_norm_out", "cpp", unsupported=no_fp16)
def rms_norm_out(x: Tensor, weight: Tensor, eps: float, weight_offset: float, out: Tensor) -> Tensor:
    rstd = torch.empty(x.shape[:-1])
    _rms_norm(
        *rows(x), DTYPES[x.dtype], pointer(weight), DTYPES[weight.dtype], weight_offset, eps, *sizes(x),
        *rows(out), pointer(rstd),
    )  # fmt: skip
    return rstd


@registry.register("rms_norm_backward_out", "cpp", unsupported=no_fp16)
def rms_norm_backward_out(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float, accumulate: bool, out: Tensor
) -> None:
    _rms_norm_backward(
        *rows(grad), *rows(x), DTYPES[x.dtype], pointer(weight), DTYPES[weight.dtype], weight_offset, pointer(rstd),
        *sizes(x), *rows(out), accumulate,
    )  # fmt: skip


@registry.register("layer_norm_out", "cpp", unsupported=no_fp16)
def layer_norm_out(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor) -> Tensor:
    stats = torch.empty(*x.shape[:-1], 2)
    _layer_norm(
        *rows(x), DTYPES[x.dtype], pointer(weight), pointer(bias), DTYPES[weight.dtype], eps, *sizes(x),
        *rows(out), pointer(stats),
    )  # fmt: skip
    return stats


@registry.register("layer_norm_backward_out", "cpp", unsupported=no_fp16)
def layer_norm_backward_out(
    grad: Tensor, x: Tensor, weight: Tensor, stats: Tensor, accumulate: bool, out: Tensor
) -> None:
    _layer_norm_backward(
        *rows(grad), *rows(x), DTYPES[x.dtype], pointer(weight), DTYPES[weight.dtype], pointer(stats),
        *sizes(x), *rows(out), accumulate,
    )  # fmt: skip
