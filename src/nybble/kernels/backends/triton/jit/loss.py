"""Cross-entropy and its gradient in place of the logits: a row is a program's, and read twice."""

import triton
import triton.language as tl

from nybble.kernels.backends.triton.jit.language import rounded

LOWEST = tl.constexpr(-3e38)  # finite, so that no difference is inf - inf


@triton.jit
def cross_entropy_kernel(
    logits, targets, losses, vocabulary, stride, gradient_scale, COLUMNS: tl.constexpr
):  # fmt: skip
    """A negative target leaves its row out; which is too large was asked before: it would read another row.
    `gradient_scale` is a number in memory.
    """
    row, lane = tl.program_id(0), tl.arange(0, COLUMNS)
    logits += row.to(tl.int64) * stride
    target = tl.load(targets + row)
    supervised = target >= 0
    wanted = tl.load(logits + target, mask=supervised, other=0.0).to(tl.float32)
    # Each lane keeps the maximum of its columns and the sum of exponentials beneath it: one exponential an element.
    largest, total = tl.full((COLUMNS,), LOWEST, tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, vocabulary, COLUMNS):
        column = first + lane
        inside = column < vocabulary
        x = tl.load(logits + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x, float("-inf"))
        ratio = tl.exp(-tl.abs(x - largest))
        total = tl.where(x > largest, total * ratio + 1, total + ratio)
        largest = tl.maximum(x, largest)
    maximum = tl.max(largest, 0)
    total = tl.sum(total * tl.exp(largest - maximum), 0)
    tl.store(losses + row, tl.where(supervised, maximum - wanted + tl.log(total), 0.0))
    share, factor = 1 / total, tl.load(gradient_scale)
    tl.debug_barrier()  # all have read what is overwritten now
    for first in range(0, vocabulary, COLUMNS):
        column = first + lane
        inside = column < vocabulary
        x = tl.load(logits + column, mask=inside, other=0.0).to(tl.float32)
        gradient = (tl.exp(x - maximum) * share - (column == target).to(tl.float32)) * factor
        gradient = rounded(tl.where(supervised, gradient, 0.0), logits.dtype.element_ty)
        tl.store(logits + column, gradient, mask=inside)
