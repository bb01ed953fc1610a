"""RMSNorm and LayerNorm of rows or of each head.

    nybble::rms_norm_out              x, weight -> written into `out`, and rstd
    nybble::rms_norm_backward_out     the gradient for x, written into or added to `out`
    nybble::layer_norm_out            x, weight, bias -> written into `out`, and mean and rstd
    nybble::layer_norm_backward_out   the gradient for x, written into or added to `out`

Forward and backward are ops of their own, for modules that write their backward out. Arithmetic is fp32 with one
rounding to the result's dtype. Outputs may be inputs: elements are read before they are written.
"""

import torch
from torch import Tensor

from nybble.kernels import registry
from nybble.kernels.ops.checks import FLOAT_DTYPES, FP32, check_rows, check_tensor, nothing
from nybble.kernels.slabs import empty_like


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`x * rstd * (weight + weight_offset)` with `rstd = 1 / sqrt(mean(x^2) + eps)` (arXiv 1910.07467).

    Args:
        x: rows [tokens, width] or [tokens, heads, width].
        weight: [width]; its dtype may differ from that of x.
        weight_offset: 1 for Gemma, whose stored weights are offsets from one.
        out: rows like x, may be x; a fresh tensor where None.

    Returns:
        the result, and rstd fp32 [tokens] or [tokens, heads], which the backward needs.
    """
    out = empty_like(x) if out is None else out
    return out, torch.ops.nybble.rms_norm_out(x, weight, eps, weight_offset, out)


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    weight_offset: float = 0.0,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """The gradient of `rms_norm` for x.

    With g = grad * (weight + weight_offset) and n = x * rstd: rstd * (g - n * mean(g * n)).

    Args:
        grad, x: rows of one shape and dtype; x is what `rms_norm` was given.
        rstd: what `rms_norm` returned.
        out: where to put it, may be grad; a fresh tensor where None.
        accumulate: add to what `out` holds (the residual branch's gradient) instead of overwriting it.
    """
    assert out is not None or not accumulate
    out = empty_like(x) if out is None else out
    torch.ops.nybble.rms_norm_backward_out(grad, x, weight, rstd, weight_offset, accumulate, out)
    return out


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`(x - mean) * rstd * weight + bias` with `rstd = 1 / sqrt(mean((x - mean)^2) + eps)` (arXiv 1607.06450).

    Args:
        x: rows [tokens, width] or [tokens, heads, width].
        weight, bias: [width], of one dtype, which may differ from that of x; no bias where None.
        out: rows like x, may be x; a fresh tensor where None.

    Returns:
        the result, and mean and rstd side by side, fp32 [tokens, 2] or [tokens, heads, 2], which the backward needs.
    """
    out = empty_like(x) if out is None else out
    return out, torch.ops.nybble.layer_norm_out(x, weight, bias, eps, out)


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stats: Tensor, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """The gradient of `layer_norm` for x.

    With g = grad * weight and n = (x - mean) * rstd: rstd * (g - mean(g) - n * mean(g * n)).

    Args:
        grad, x: rows of one shape and dtype; x is what `layer_norm` was given.
        stats: what `layer_norm` returned.
        out: where to put it, may be grad; a fresh tensor where None.
        accumulate: add to what `out` holds (the residual branch's gradient) instead of overwriting it.
    """
    assert out is not None or not accumulate
    out = empty_like(x) if out is None else out
    torch.ops.nybble.layer_norm_backward_out(grad, x, weight, stats, accumulate, out)
    return out


def _check_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor) -> None:
    check_rows(None, x=x, out=out)
    check_tensor("weight", weight, x, x.shape[-1:], FLOAT_DTYPES)
    if bias is not None:
        check_tensor("bias", bias, x, x.shape[-1:], (weight.dtype,))


def _check_layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stats: Tensor, accumulate: bool, out: Tensor
) -> None:
    check_rows(None, grad=grad, x=x, out=out)
    check_tensor("weight", weight, x, x.shape[-1:], FLOAT_DTYPES)
    check_tensor("stats", stats, x, (*x.shape[:-1], 2), FP32)


def _check_rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float, out: Tensor) -> None:
    check_rows(None, x=x, out=out)
    check_tensor("weight", weight, x, x.shape[-1:], FLOAT_DTYPES)


def _check_rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float, accumulate: bool, out: Tensor
) -> None:
    check_rows(None, grad=grad, x=x, out=out)
    check_tensor("weight", weight, x, x.shape[-1:], FLOAT_DTYPES)
    check_tensor("rstd", rstd, x, x.shape[:-1], FP32)


registry.declare(
    "rms_norm_out",
    "(Tensor x, Tensor weight, float eps, float weight_offset, Tensor(a!) out) -> Tensor",
    _check_rms_norm,
    lambda x, *rest: x.new_empty(x.shape[:-1], dtype=torch.float32),
)
registry.declare(
    "rms_norm_backward_out",
    "(Tensor grad, Tensor x, Tensor weight, Tensor rstd, float weight_offset, bool accumulate, Tensor(a!) out) -> ()",
    _check_rms_norm_backward,
    nothing,
)
registry.declare(
    "layer_norm_out",
    "(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor(a!) out) -> Tensor",
    _check_layer_norm,
    lambda x, *rest: x.new_empty((*x.shape[:-1], 2), dtype=torch.float32),
)
registry.declare(
    "layer_norm_backward_out",
    "(Tensor grad, Tensor x, Tensor weight, Tensor stats, bool accumulate, Tensor(a!) out) -> ()",
    _check_layer_norm_backward,
    nothing,
)
