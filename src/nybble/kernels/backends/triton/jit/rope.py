"""Rotary position embedding of heads [tokens, heads, head_dim], in place; each head is a row."""

import triton
import triton.language as tl

from nybble.kernels.backends.triton.jit.language import rounded, tile


@triton.jit(do_not_specialize=["rows"])
def rope_kernel(
    x, cos, sin, heads, head_dim, stride, rows, width,
    NEIGHBOURS: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`width`, half of what is turned: cos and sin are fp32 [tokens, width]."""
    row, column, inside = tile(rows, width, ROWS, COLUMNS)
    token = row // heads
    cosine = tl.load(cos + token * width + column, mask=inside, other=0.0)
    sine = tl.load(sin + token * width + column, mask=inside, other=0.0)
    if BACKWARD:
        sine = -sine
    head = x + token.to(tl.int64) * stride + row % heads * head_dim
    if NEIGHBOURS:
        low = head + 2 * column
        high = low + 1
    else:
        low = head + column
        high = low + width
    first = tl.load(low, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(high, mask=inside, other=0.0).to(tl.float32)
    tl.store(low, rounded(first * cosine - second * sine, x.dtype.element_ty), mask=inside)
    tl.store(high, rounded(second * cosine + first * sine, x.dtype.element_ty), mask=inside)
