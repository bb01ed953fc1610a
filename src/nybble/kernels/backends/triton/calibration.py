"""jit/calibration.py."""

from typing import Any

import torch
from torch import Tensor

from nybble.formats.codebooks import codebook, dynamic_map, dynamic_midpoints, midpoints, sorted_order
from nybble.formats.format import FORMATS
from nybble.kernels import registry
from nybble.kernels.backends.reference.calibration import REFITS
from nybble.kernels.backends.triton.launch import INTERPRETED, launch, launch_tiles, power_of_two, too_many

COLUMNS = 512 if INTERPRETED else 8  # whose targets lie in the registers of one warp: 32 bytes of a row, one sector

PER_WARP = 256  # elements of a wide block: with 512 the registers do not suffice


def _too_large(tensor: Tensor, *others: Any) -> str | None:
    return too_many(tensor.numel())


@registry.register("search_scales", "triton", _too_large)
def search_scales(
    weight: Tensor,
    importance: Tensor,
    step: Tensor | None,
    offset: Tensor | None,
    format: str,
    block_size: int,
    starts: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    from nybble.kernels.backends.triton.jit.calibration import search_scales_kernel

    device, blocks = weight.device, -(-weight.numel() // block_size)
    scale, codes = weight.new_empty(blocks), weight.new_empty(blocks, dtype=torch.uint8)
    indices = torch.empty_like(weight, dtype=torch.uint8)
    launch_tiles(
        search_scales_kernel, blocks, block_size,
        weight, importance, weight if step is None else step, weight if offset is None else offset,
        torch.tensor(starts, dtype=torch.float32, device=device), *_tables(format, device),
        dynamic_map(device), dynamic_midpoints(device), scale, codes, indices,
        weight.numel(), importance.numel(), len(starts),
        whole_rows=True, per_warp=PER_WARP, BITS=FORMATS[format].bits, GRID=step is not None, REFITS=REFITS,
    )  # fmt: skip
    return scale, codes, indices


@registry.register("assign_columns", "triton", _too_large)
def assign_columns(target: Tensor, scale: Tensor, factors: Tensor, format: str) -> tuple[Tensor, Tensor]:
    from nybble.kernels.backends.triton.jit.calibration import assign_columns_kernel

    (rows, columns), indices = target.shape, torch.empty_like(target, dtype=torch.uint8)
    lost = torch.empty_like(target)
    launch(
        assign_columns_kernel, -(-columns // COLUMNS),
        target, scale, factors, *_tables(format, target.device), indices, lost, rows, columns,
        BITS=FORMATS[format].bits, ROWS=power_of_two(rows), COLUMNS=COLUMNS, num_warps=1,
    )  # fmt: skip
    return indices, lost


def _tables(format: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return codebook(format, device), midpoints(format, device), sorted_order(format, device)
