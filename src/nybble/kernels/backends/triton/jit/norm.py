"""RMSNorm of rows [tokens, width] or [tokens, heads, width], tokens apart by a stride; a tile is whole rows.

Outputs may be inputs: a result is stored over elements that it was made of.
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
