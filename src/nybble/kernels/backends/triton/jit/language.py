"""What kernels share."""

import triton
import triton.language as tl

from nybble.formats import double_quant
from nybble.kernels.backends.triton import launch

INTERPRETED = tl.constexpr(launch.INTERPRETED)
MIN_SCALE = tl.constexpr(double_quant.MIN_SCALE)  # fp64 to Triton, as all numbers so small: to be cast


@triton.jit
def tile(rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's rows (R, 1) and columns (1, C), and which of its elements there are (R, C); along a row first."""
    across = (width + COLUMNS - 1) // COLUMNS
    row = (tl.program_id(0) // across * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row, column, (row < rows) & (column < width)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x, fp32, to the nearest of `dtype`, ties to even. The interpreter's own conversion to bf16 cuts off; here it
    takes finite values only.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def bucket(values, midpoints, BITS: tl.constexpr):
    """How many of the `2 ** BITS - 1` ascending midpoints are less than each value, int32: one goes to the lower."""
    place = tl.zeros(values.shape, tl.int32)
    for bit in tl.static_range(BITS):
        half = 1 << (BITS - 1 - bit)
        place += tl.where(tl.load(midpoints + place + (half - 1)) < values, half, 0)
    return place


@triton.jit
def widened(x):
    """x in fp32. The interpreter's own conversion gets numbers wrong that are less than bf16's least normal one."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)
