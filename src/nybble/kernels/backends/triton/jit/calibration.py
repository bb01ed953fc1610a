"""The inner loops of calibration; the reference's operations, each rounded, in its order but for sums over a block."""

import triton
import triton.language as tl

from nybble.kernels.backends.triton.jit.language import MIN_SCALE, bucket, tile


@triton.jit(do_not_specialize=["rows", "period", "num_starts"])
def search_scales_kernel(
    weight, importance, step, offset, starts, levels, midpoints, order, dynamic_map, dynamic_midpoints,
    scale_out, codes_out, indices_out, numel, period, num_starts, rows, width,
    BITS: tl.constexpr, GRID: tl.constexpr, REFITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile's blocks (rows, width) stay in registers while all scales are tried."""
    block, column, begun = tile(rows, width, ROWS, COLUMNS)
    at = block * COLUMNS + column
    inside = begun & (at < numel)
    w = tl.load(weight + at, mask=inside, other=0.0)
    h = tl.load(importance + at % period, mask=inside, other=0.0)
    block_step = tl.load(step + block, mask=block < rows, other=0.0) if GRID else 0.0
    shift = tl.load(offset) if GRID else 0.0
    least_scale = tl.cast(MIN_SCALE, tl.float32)
    step_inverse = tl.div_rn(1.0, tl.maximum(block_step, least_scale)) if GRID else 0.0
    largest = tl.max(tl.abs(w), 1, keep_dims=True)

    best, code = _on_grid(largest, block_step, step_inverse, shift, dynamic_map, dynamic_midpoints, GRID)
    least = _error(w, h, best, levels, midpoints, order, BITS)
    for number in range(num_starts):
        scale = tl.load(starts + number) * largest
        for _ in range(REFITS):
            level = tl.load(levels + _nearest(w, _inverse(scale), midpoints, order, BITS))
            square = tl.sum(h * level * level, 1, keep_dims=True)
            product = tl.sum(h * w * level, 1, keep_dims=True)
            refitted = tl.where(square > 0, tl.div_rn(product, tl.where(square > 0, square, 1.0)), 0.0)
            scale = tl.where(tl.abs(scale) > least_scale, refitted, scale)
        rounded, rounded_code = _on_grid(scale, block_step, step_inverse, shift, dynamic_map, dynamic_midpoints, GRID)
        error = _error(w, h, rounded, levels, midpoints, order, BITS)
        better = (error < least) & (tl.abs(scale) > least_scale)
        least = tl.where(better, error, least)
        best = tl.where(better, rounded, best)
        code = tl.where(better, rounded_code, code)

    tl.store(scale_out + block, best, mask=block < rows)
    tl.store(codes_out + block, code.to(tl.uint8), mask=block < rows)
    index = _nearest(w, _inverse(best), midpoints, order, BITS)
    tl.store(indices_out + at, index.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def assign_columns_kernel(
    target, scale, factors, levels, midpoints, order, indices_out, lost_out, rows, columns,
    BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of the target, all of whose rows stay in registers, one after the other."""
    row, column = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    at = row[:, None] * columns + column[None, :]
    wanted = tl.load(target + at, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
    s = tl.load(scale + column, mask=inside, other=0.0)
    inverse = _inverse(s)
    for j in range(rows):
        this = tl.sum(tl.where((row == j)[:, None], wanted, 0.0), 0)  # with zeros: exact
        index = _nearest(this, inverse, midpoints, order, BITS)
        lost = this - tl.load(levels + index) * s
        tl.store(indices_out + j * columns + column, index.to(tl.uint8), mask=inside)
        tl.store(lost_out + j * columns + column, lost, mask=inside)
        factor = tl.load(factors + j * rows + row, mask=(row > j) & (row < rows), other=0.0)
        wanted -= lost[None, :] * factor[:, None]


@triton.jit
def _inverse(scale):
    return tl.where(scale == 0, 0.0, tl.div_rn(1.0, tl.where(scale == 0, 1.0, scale)))


@triton.jit
def _nearest(w, inverse, midpoints, order, BITS: tl.constexpr):
    """Indices of the nearest levels, int32."""
    return tl.load(order + bucket(w * inverse, midpoints, BITS)).to(tl.int32)


@triton.jit
def _on_grid(scale, step, step_inverse, offset, dynamic_map, dynamic_midpoints, GRID: tl.constexpr):
    """The nearest value of each block's grid and its code; the scale itself and zeros where there is no grid."""
    if GRID:
        code = bucket((scale - offset) * step_inverse, dynamic_midpoints, 8)
        return tl.load(dynamic_map + code) * step + offset, code
    else:
        return scale, tl.zeros(scale.shape, tl.int32)


@triton.jit
def _error(w, h, scale, levels, midpoints, order, BITS: tl.constexpr):
    lost = w - tl.load(levels + _nearest(w, _inverse(scale), midpoints, order, BITS)) * scale
    return tl.sum(h * lost * lost, 1, keep_dims=True)
