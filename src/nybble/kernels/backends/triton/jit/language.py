"""What kernels share."""

import triton
import triton.language as tl

from nybble.kernels.backends.triton import launch

INTERPRETED = tl.constexpr(launch.INTERPRETED)


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
