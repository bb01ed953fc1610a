"""AdamW of a flat tensor, with moments in fp32 or in 8 bits; the reference's operations in its order."""

import triton
import triton.language as tl

from nybble.kernels.backends.reference.optimizer import SIGNED_ZERO as REFERENCE_SIGNED_ZERO
from nybble.kernels.backends.reference.optimizer import TINIEST as REFERENCE_TINIEST
from nybble.kernels.backends.triton.jit.language import bucket

SIGNED_ZERO, TINIEST = tl.constexpr(REFERENCE_SIGNED_ZERO), tl.constexpr(REFERENCE_TINIEST)


@triton.jit
def adamw_kernel(
    param, grad, exp_avg, exp_avg_sq, numel,
    grad_scale, decay, mean_weight, square_decay, square_weight, root, eps, step_size, ELEMENTS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = at < numel
    p, mean, square = _updated(
        tl.load(param + at, mask=inside), tl.load(grad + at, mask=inside),
        tl.load(exp_avg + at, mask=inside), tl.load(exp_avg_sq + at, mask=inside),
        grad_scale, decay, mean_weight, square_decay, square_weight, root, eps, step_size,
    )  # fmt: skip
    tl.store(param + at, p, mask=inside)
    tl.store(exp_avg + at, mean, mask=inside)
    tl.store(exp_avg_sq + at, square, mask=inside)


@triton.jit
def adamw_8bit_kernel(
    param, grad, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax,
    signed_map, signed_midpoints, unsigned_map, unsigned_midpoints, numel,
    grad_scale, decay, mean_weight, square_decay, square_weight, root, eps, step_size,
    BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    begin = block.to(tl.int64) * BLOCK_SIZE
    at = begin[:, None] + tl.arange(0, BLOCK_SIZE)[None, :]
    begun, inside = begin < numel, at < numel
    p, mean, square = _updated(
        tl.load(param + at, mask=inside, other=0.0), tl.load(grad + at, mask=inside, other=0.0),
        _decoded(exp_avg + at, inside, exp_avg_absmax + block, begun, signed_map, SIGNED_ZERO),
        _decoded(exp_avg_sq + at, inside, exp_avg_sq_absmax + block, begun, unsigned_map, 0),
        grad_scale, decay, mean_weight, square_decay, square_weight, root, eps, step_size,
    )  # fmt: skip
    tl.store(param + at, p, mask=inside)
    code, absmax = _nearest(mean, signed_midpoints)
    code -= ((mean < 0) & (code == SIGNED_ZERO)).to(tl.int32)  # a negative mean never becomes zero
    tl.store(exp_avg + at, code.to(tl.uint8), mask=inside)
    tl.store(exp_avg_absmax + block, absmax, mask=begun)
    code, absmax = _nearest(square, unsigned_midpoints)
    tl.store(exp_avg_sq + at, code.to(tl.uint8), mask=inside)
    tl.store(exp_avg_sq_absmax + block, absmax, mask=begun)


@triton.jit
def _updated(
    p, grad, mean, square, grad_scale, decay, mean_weight, square_decay, square_weight, root, eps, step_size
):  # fmt: skip
    """The parameter and its moments after a step; divisions and roots rounded to nearest."""
    g = grad * grad_scale
    mean = tl.fma(g - mean, mean_weight, mean)
    square = square * square_decay + square_weight * g * g
    denominator = tl.div_rn(tl.sqrt_rn(square), root) + eps
    return p * decay + tl.div_rn(step_size * mean, denominator), mean, square


@triton.jit
def _decoded(codes, inside, absmax, begun, dynamic_map, ZERO: tl.constexpr):
    """A moment, fp32 (blocks, block size); `ZERO`, the code of 0, beyond the last element."""
    code = tl.load(codes, mask=inside, other=ZERO).to(tl.int32)
    return tl.load(dynamic_map + code) * tl.load(absmax, mask=begun, other=0.0)[:, None]


@triton.jit
def _nearest(values, midpoints):
    """The code of each value, and the scale of each block."""
    absmax = tl.max(tl.abs(values), 1)
    scaled = tl.div_rn(values, tl.maximum(absmax, tl.cast(TINIEST, tl.float32))[:, None])  # of zeros, zeros
    return bucket(scaled, midpoints, 8), absmax
