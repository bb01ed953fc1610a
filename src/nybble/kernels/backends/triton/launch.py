"""How every kernel is started."""

import os
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WARPS = 4  # of a program
# Of a program. The interpreter takes some milliseconds for a program, whatever its size.
THREADS = 4096 if INTERPRETED else WARPS * (64 if torch.version.hip else 32)
TILE = 4096 if INTERPRETED else 1024  # elements of a program that takes some of a tensor's rows and columns
MAX_WARPS = 16
PER_WARP = 512  # elements of a tile that is as wide as a row, unless its kernel needs many registers
MAX_ELEMENTS = 2**31 - 2**16  # offsets have 32 bits, and a last program counts past the end


def launch(kernel: Any, programs: int, *arguments: Any, num_warps: int = WARPS, **constants: Any) -> None:
    """Start `programs` programs on the device of the first argument, a tensor; products and sums stay two operations,
    each rounded, as in the reference.
    """
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, num_warps=num_warps, enable_fp_fusion=False, **constants)


def launch_tiles(
    kernel: Any, rows: int, width: int, *arguments: Any,
    whole_rows: bool = False, per_warp: int = PER_WARP, **constants: Any,
) -> None:  # fmt: skip
    """Start a program for each tile of `rows` rows of `width` elements (see `tile` in jit/language.py)."""
    tile_rows, columns, num_warps = tile_of(width, whole_rows, per_warp)
    launch(
        kernel, -(-rows // tile_rows) * -(-width // columns),
        *arguments, rows=rows, width=width, ROWS=tile_rows, COLUMNS=columns, **constants, num_warps=num_warps,
    )  # fmt: skip


def tile_of(width: int, whole_rows: bool, per_warp: int = PER_WARP) -> tuple[int, int, int]:
    """A tile's rows and columns, for rows of that width, and its program's warps: more where it is as wide as a row."""
    columns = power_of_two(width) if whole_rows else min(power_of_two(width), TILE)
    return max(1, TILE // columns), columns, min(max(columns // per_warp, WARPS), MAX_WARPS)


def power_of_two(least: int) -> int:
    """The first that is no less: what Triton's tiles are wide."""
    return 1 << (least - 1).bit_length()


def too_many(elements: int) -> str | None:
    """None, or that there are more elements than a kernel can count."""
    return None if elements <= MAX_ELEMENTS else f"takes at most {MAX_ELEMENTS:,} elements, not {elements:,}"
