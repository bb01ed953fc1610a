"""Attention of one token a row to columns of a cache, some columns at a time with a running maximum (Milakov &
Gimelshein 2018, arXiv 1805.02867). A row's columns are dealt to several programs, since there are few rows.
"""

import triton
import triton.language as tl

from nybble.kernels.backends.triton.jit.language import rounded, widened

LOWEST = tl.constexpr(-3e38)  # finite, so that no difference is inf - inf


@triton.jit(do_not_specialize=["heads_stride"])
def cached_attention_kernel(
    heads, keys, values, texts, columns, starts, maxima, sums, outputs,
    heads_stride, num_heads, kv_heads, head_dim, capacity, window, scale, softcap,
    SOFTCAP: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """For each row, head and part: the largest score, the sum of exponentials beneath it, and the sum of values times
    these, fp32 (rows, heads, PARTS) and (rows, heads, PARTS, WIDTH).
    """
    part, head = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS % num_heads
    row, d, lane = tl.program_id(0) // (PARTS * num_heads), tl.arange(0, WIDTH), tl.arange(0, COLUMNS)
    text, last = tl.load(texts + row), tl.load(columns + row).to(tl.int32)
    first = tl.load(starts + row).to(tl.int32)
    if window > 0:
        first = tl.maximum(first, last + 1 - window)
    begin = (text * kv_heads + head // (num_heads // kv_heads)) * capacity * head_dim  # int64, of its text and head
    within = d < head_dim
    q = widened(tl.load(heads + row.to(tl.int64) * heads_stride + head * head_dim + d, mask=within, other=0.0))
    largest, total, mixed = tl.cast(LOWEST, tl.float32), tl.cast(0.0, tl.float32), tl.zeros((WIDTH,), tl.float32)
    for left in range(first + part * COLUMNS, last + 1, PARTS * COLUMNS):
        column = left + lane
        seen = column <= last
        at = begin + column[:, None].to(tl.int64) * head_dim + d[None, :]
        inside = seen[:, None] & within[None, :]
        score = tl.sum(widened(tl.load(keys + at, mask=inside, other=0.0)) * q[None, :], 1) * scale  # (C)
        if SOFTCAP:
            score = softcap * (2 * tl.sigmoid(2 * score / softcap) - 1)  # the interpreter has no tanh
        score = tl.where(seen, score, LOWEST)
        maximum = tl.maximum(largest, tl.max(score, 0))
        share = tl.where(seen, tl.exp(score - maximum), 0.0)
        ratio = tl.exp(largest - maximum)
        v = widened(tl.load(values + at, mask=inside, other=0.0))
        total, mixed = total * ratio + tl.sum(share, 0), mixed * ratio + tl.sum(share[:, None] * v, 0)
        largest = maximum
    tl.store(maxima + tl.program_id(0), largest)
    tl.store(sums + tl.program_id(0), total)
    tl.store(outputs + tl.program_id(0) * WIDTH + d, mixed)


@triton.jit
def join_kernel(maxima, sums, outputs, out, head_dim, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """out (rows, heads * head_dim) from the parts of each row and head; one that saw no column counts nothing."""
    part, d = tl.program_id(0) * PARTS + tl.arange(0, PARTS), tl.arange(0, WIDTH)
    largest = tl.load(maxima + part)
    ratio = tl.exp(largest - tl.max(largest, 0))  # (P)
    mixed = tl.load(outputs + part[:, None] * WIDTH + d[None, :])
    joined = tl.sum(mixed * ratio[:, None], 0) / tl.sum(tl.load(sums + part) * ratio, 0)
    tl.store(out + tl.program_id(0) * head_dim + d, rounded(joined, out.dtype.element_ty), mask=d < head_dim)
