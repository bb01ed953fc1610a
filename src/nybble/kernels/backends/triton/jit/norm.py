"""RMSNorm and LayerNorm of rows [tokens, width] or [tokens, heads, width], tokens apart by a stride.

A tile is whole rows. Outputs may be inputs: a result is stored over elements that it was made of.
"""

import triton
import triton.language as tl

from nybble.kernels.backends.triton.jit.language import rounded, tile


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x, weight, out, rstd, heads, x_stride, out_stride, eps, weight_offset, rows, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, inside = tile(rows, width, ROWS, COLUMNS)
    token, at = (row // heads).to(tl.int64), row % heads * width + column
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + weight_offset
    wide = tl.load(x + token * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 1, keep_dims=True) / width + eps)
    tl.store(rstd + row, inverse, mask=row < rows)
    tl.store(out + token * out_stride + at, rounded(wide * inverse * scale, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_kernel(
    grad, x, weight, rstd, out, heads, grad_stride, x_stride, out_stride, weight_offset, rows, width,
    ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, inside = tile(rows, width, ROWS, COLUMNS)
    token, at = (row // heads).to(tl.int64), row % heads * width + column
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + weight_offset
    inverse = tl.load(rstd + row, mask=row < rows, other=0.0)
    g = tl.load(grad + token * grad_stride + at, mask=inside, other=0.0).to(tl.float32) * scale
    normed = tl.load(x + token * x_stride + at, mask=inside, other=0.0).to(tl.float32) * inverse
    result = (g - normed * (tl.sum(g * normed, 1, keep_dims=True) / width)) * inverse
    target = out + token * out_stride + at
    if ACCUMULATE:
        result += tl.load(target, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, rounded(result, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_kernel(
    x, weight, bias, out, stats, heads, x_stride, out_stride, eps, rows, width,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`bias` is read with BIAS only."""
    row, column, inside = tile(rows, width, ROWS, COLUMNS)
    token, at = (row // heads).to(tl.int64), row % heads * width + column
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    wide = tl.load(x + token * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(wide, 1, keep_dims=True) / width
    centred = tl.where(inside, wide - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 1, keep_dims=True) / width + eps)
    tl.store(stats + 2 * row, mean, mask=row < rows)
    tl.store(stats + 2 * row + 1, inverse, mask=row < rows)
    result = centred * inverse * scale
    if BIAS:
        result += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + at, rounded(result, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_backward_kernel(
    grad, x, weight, stats, out, heads, grad_stride, x_stride, out_stride, rows, width,
    ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, inside = tile(rows, width, ROWS, COLUMNS)
    token, at = (row // heads).to(tl.int64), row % heads * width + column
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    mean = tl.load(stats + 2 * row, mask=row < rows, other=0.0)
    inverse = tl.load(stats + 2 * row + 1, mask=row < rows, other=0.0)
    g = tl.load(grad + token * grad_stride + at, mask=inside, other=0.0).to(tl.float32) * scale
    normed = (tl.load(x + token * x_stride + at, mask=inside, other=0.0).to(tl.float32) - mean) * inverse
    mean_g = tl.sum(g, 1, keep_dims=True) / width
    result = (g - mean_g - normed * (tl.sum(g * normed, 1, keep_dims=True) / width)) * inverse
    target = out + token * out_stride + at
    if ACCUMULATE:
        result += tl.load(target, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, rounded(result, out.dtype.element_ty), mask=inside)
