"""The C++ bodies of block_ops.py (csrc/rms_norm.cpp, rope.cpp, swiglu.cpp, cross_entropy.cpp, adamw.cpp, gemv.cpp)."""

import functools

import torch
from torch import Tensor

from nybble.formats import codebooks
from nybble.formats.codebooks import dynamic_map, dynamic_midpoints
from nybble.formats.format import FORMATS
from nybble.kernels import registry
from nybble.kernels.block_ops import check_targets
from nybble.kernels.cpu import DTYPES, FLOAT, INT, INT64, POINTER, dequantize_4bit, function, pointer, scale_pointers

_ROWS = (POINTER, INT64)  # a pointer and the distance between tokens

_rms_norm = function("rms_norm", *_ROWS, INT, POINTER, INT, FLOAT, FLOAT, INT64, INT64, INT64, *_ROWS, POINTER)
_rms_norm_backward = function(
    "rms_norm_backward", *_ROWS, *_ROWS, INT, POINTER, INT, FLOAT, POINTER, INT64, INT64, INT64, *_ROWS, INT
)
_rms_norm_weight_gradient = function("rms_norm_weight_gradient", POINTER, POINTER, INT, POINTER, INT64, INT64, POINTER)
_rope = function("rope", POINTER, INT, INT64, INT64, INT64, INT64, POINTER, POINTER, INT64, INT)
_swiglu = function("swiglu", *_ROWS, *_ROWS, INT, INT64, INT64, *_ROWS)
_swiglu_backward = function("swiglu_backward", *_ROWS * 3, INT, INT64, INT64, *_ROWS * 3)
_cross_entropy = function("cross_entropy", *_ROWS, INT, POINTER, INT64, INT64, FLOAT, POINTER)
_adamw = function("adamw", *[POINTER] * 4, INT64, *[FLOAT] * 8)
_adamw_8bit = function("adamw_8bit", *[POINTER] * 10, INT64, *[FLOAT] * 8)
_gemv = function("gemv", POINTER, INT, INT64, INT64, INT64, POINTER, *[POINTER] * 6, POINTER, FLOAT, INT64, POINTER)


def _no_fp16(*arguments: object) -> str | None:
    if any(isinstance(argument, Tensor) and argument.dtype == torch.float16 for argument in arguments):
        return "has no fp16 body for this op"
    return None


def _rows(x: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if x is None else (x.data_ptr(), x.stride(0))


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Tokens, heads, width."""
    return x.shape[0], x.shape[1] if x.dim() == 3 else 1, x.shape[-1]


@registry.register("rms_norm_out", "cpp", unsupported=_no_fp16)
def rms_norm_out(x: Tensor, weight: Tensor, eps: float, weight_offset: float, out: Tensor) -> Tensor:
    rstd = torch.empty(x.shape[:-1])
    _rms_norm(
        *_rows(x), DTYPES[x.dtype], pointer(weight), DTYPES[weight.dtype], weight_offset, eps, *_sizes(x),
        *_rows(out), pointer(rstd),
    )  # fmt: skip
    return rstd


@registry.register("rms_norm_backward_out", "cpp", unsupported=_no_fp16)
def rms_norm_backward_out(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float, accumulate: bool, out: Tensor
) -> None:
    _rms_norm_backward(
        *_rows(grad), *_rows(x), DTYPES[x.dtype], pointer(weight), DTYPES[weight.dtype], weight_offset, pointer(rstd),
        *_sizes(x), *_rows(out), accumulate,
    )  # fmt: skip


@registry.register("rms_norm_weight_gradient", "cpp", unsupported=_no_fp16)
def rms_norm_weight_gradient(grad: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    result = torch.empty(x.shape[-1])
    _rms_norm_weight_gradient(
        pointer(grad), pointer(x), DTYPES[x.dtype], pointer(rstd), rstd.numel(), x.shape[-1], pointer(result)
    )
    return result


@registry.register("rope_", "cpp", unsupported=_no_fp16)
def rope_(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> None:
    tokens, heads, head_dim = _sizes(x)
    _rope(
        pointer(x), DTYPES[x.dtype], tokens, x.stride(0), heads, head_dim, pointer(cos), pointer(sin), cos.shape[-1],
        backward,
    )  # fmt: skip


@registry.register("swiglu_out", "cpp", unsupported=_no_fp16)
def swiglu_out(gate: Tensor, up: Tensor, out: Tensor) -> None:
    _swiglu(*_rows(gate), *_rows(up), DTYPES[gate.dtype], *gate.shape, *_rows(out))


@registry.register("swiglu_backward_out", "cpp", unsupported=_no_fp16)
def swiglu_backward_out(
    grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, act: Tensor | None
) -> None:
    _swiglu_backward(
        *_rows(grad), *_rows(gate), *_rows(up), DTYPES[gate.dtype], *gate.shape,
        *_rows(grad_gate), *_rows(grad_up), *_rows(act),
    )  # fmt: skip


@registry.register("cross_entropy_", "cpp", unsupported=_no_fp16)
def cross_entropy_(logits: Tensor, targets: Tensor, gradient_scale: float) -> Tensor:
    check_targets(targets, logits.shape[1])
    losses = torch.empty(logits.shape[0])
    _cross_entropy(
        *_rows(logits), DTYPES[logits.dtype], pointer(targets), *logits.shape, gradient_scale, pointer(losses)
    )
    return losses


@registry.register("adamw_", "cpp")
def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float,
) -> None:
    _adamw(
        pointer(param), pointer(grad), pointer(exp_avg), pointer(exp_avg_sq), param.numel(),
        *_adamw_numbers(step, lr, beta1, beta2, eps, weight_decay, grad_scale),
    )  # fmt: skip


@registry.register("adamw_8bit_", "cpp")
def adamw_8bit_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq_absmax: Tensor,
    step: int,
    *numbers: float,
) -> None:
    tables = [table(signed=signed) for signed in (True, False) for table in (dynamic_map, dynamic_midpoints)]
    states = (param, grad, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax)
    _adamw_8bit(*map(pointer, (*states, *tables)), param.numel(), *_adamw_numbers(step, *numbers))


def _adamw_numbers(
    step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, grad_scale: float
) -> tuple[float, ...]:
    """What both kernels take after the number of elements."""
    corrected, root_correction = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    return 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, corrected, root_correction, eps, grad_scale


@registry.register("gemv_4bit", "cpp", unsupported=_no_fp16)
def gemv_4bit(
    x: Tensor, packed: Tensor, scales: Tensor, shape: list[int], format: str, block_size: int, double_quant: bool
) -> Tensor:
    if FORMATS[format].bits != 4:  # no fused body: the weight is made, then multiplied
        return x @ dequantize_4bit(packed, scales, shape, format, block_size, double_quant, x.dtype).T
    out_features, in_features = shape
    codebook, factor = codebook_for_bf16(format)
    y = torch.empty(x.shape[0], out_features, dtype=x.dtype)
    _gemv(
        pointer(x), DTYPES[x.dtype], x.shape[0], in_features, out_features, pointer(packed),
        *scale_pointers(scales, format, block_size, double_quant, out_features * in_features),
        pointer(codebook), factor, block_size, pointer(y),
    )  # fmt: skip
    return y


@functools.cache
def codebook_for_bf16(format: str) -> tuple[Tensor, float]:
    """The codebook times a factor, and that factor in [1, 2): the one for which rounding to bf16 changes least.

    The integer formats and fp4 become exact; nf4's relative error falls from 0.0014 to 0.0008 (root of the mean
    square), under the 0.001 of weights that were dequantised to bf16.
    """
    if FORMATS[format].zero_points:  # integers already; zero points are subtracted from them
        return codebooks.codebook(format), 1.0
    factors = torch.linspace(1, 2, 4097)[:-1]  # 7 / 4 and 12 / 8 are among them
    scaled = codebooks.codebook(format) * factors[:, None]  # (candidates, 16)
    error = (scaled.bfloat16().float() / scaled - 1).nan_to_num()  # 0 / 0 is the zero level
    best = int(error.square().sum(1).argmin())
    return scaled[best], float(factors[best])
