"""The inner loops of calibration.

    nybble::search_scales     weights -> scales (and their 8-bit codes), indices
    nybble::assign_columns    targets, one column after the other -> indices, what each lost

All arithmetic is fp32. Both take formats of any number of levels up to 16 without zero points.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nybble.errors import KernelError
from nybble.kernels import registry
from nybble.kernels.ops.checks import FP32, check_tensor

MAX_ROWS = 128  # of `assign_columns`: a column's targets stay in the first-level cache


class ScaleGrid(NamedTuple):
    """The values that double-quantised scales can have: `dynamic_map * step + offset`.

    Args:
        step: fp32 `[B]`, for each block the absmax2 of its double-quantisation block.
        offset: fp32 `[1]`.
    """

    step: Tensor
    offset: Tensor


class FoundScales(NamedTuple):
    """Args:
    scale: fp32 `[B]`, of either sign.
    codes: uint8 `[B]`, the scale's place in its grid; zeros where there is no grid.
    indices: uint8, the weight's shape: the nearest levels under these scales.
    """

    scale: Tensor
    codes: Tensor
    indices: Tensor


def search_scales(
    weight: Tensor,
    format: str,
    block_size: int,
    starts: Sequence[float],
    importance: Tensor | None = None,
    grid: ScaleGrid | None = None,
) -> FoundScales:
    """For each block the scale under which the nearest levels lose least, `sum h (w - scale c)^2`.

    Tried are absmax itself and, from each of `starts` times absmax, two rounds of: c = nearest levels of w / s, then
    s = sum h w c / sum h c^2. With a grid every candidate is rounded to it before it is judged.

    Args:
        weight: fp32, contiguous; blocks of `block_size` consecutive elements, the last may be shorter.
        starts: multiples of absmax; negative ones turn the codebook round.
        importance: h, fp32 `[period]`, of element i at i % period; equal for all where None.
        grid: where double-quantised scales may lie.
    """
    weights = torch.ones(block_size, device=weight.device) if importance is None else importance
    step, offset = (None, None) if grid is None else grid
    return FoundScales(*torch.ops.nybble.search_scales(weight, weights, step, offset, format, block_size, list(starts)))


def assign_columns(target: Tensor, scale: Tensor, factors: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Levels for one row of `target` after the other; what a row lost is spread over the rows below it.

        lost[j] = target[j] - codebook[nearest(target[j] / scale)] * scale
        target[k] -= lost[j] * factors[j, k]    for k > j

    Source: error feedback (GPTQ, arXiv 2210.17323).

    Args:
        target: fp32 `[K, n]`, K at most `MAX_ROWS`; not changed.
        scale: fp32 `[n]`.
        factors: fp32 `[K, K]`, of which the part above the diagonal is read.

    Returns:
        indices uint8 `[K, n]` and lost fp32 `[K, n]`.
    """
    return torch.ops.nybble.assign_columns(target, scale, factors, format)


def _check_search(
    weight: Tensor,
    importance: Tensor,
    step: Tensor | None,
    offset: Tensor | None,
    format: str,
    block_size: int,
    starts: list[float],
) -> None:
    check_tensor("weight", weight, weight, weight.shape, FP32)
    if weight.numel() == 0 or importance.numel() == 0:
        raise KernelError("weight or importance is empty.", "Allowed: at least one element.")
    check_tensor("importance", importance, weight, (importance.numel(),), FP32)
    if step is not None:
        assert offset is not None
        check_tensor("step", step, weight, (-(-weight.numel() // block_size),), FP32)
        check_tensor("offset", offset, weight, (1,), FP32)


def _fake_search(
    weight: Tensor,
    importance: Tensor,
    step: Tensor | None,
    offset: Tensor | None,
    format: str,
    block_size: int,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = -(-weight.numel() // block_size)
    codes = weight.new_empty(blocks, dtype=torch.uint8)
    return weight.new_empty(blocks), codes, torch.empty_like(weight, dtype=torch.uint8)


def _check_assign(target: Tensor, scale: Tensor, factors: Tensor, format: str) -> None:
    if target.dim() != 2 or not 0 < target.shape[0] <= MAX_ROWS:
        raise KernelError(f"target has shape {tuple(target.shape)}.", f"Allowed: 1 to {MAX_ROWS} rows.")
    rows, columns = target.shape
    check_tensor("target", target, target, (rows, columns), FP32)
    check_tensor("scale", scale, target, (columns,), FP32)
    check_tensor("factors", factors, target, (rows, rows), FP32)


registry.declare(
    "search_scales",
    "(Tensor weight, Tensor importance, Tensor? step, Tensor? offset, str format, int block_size, float[] starts)"
    " -> (Tensor scale, Tensor codes, Tensor indices)",
    _check_search,
    _fake_search,
)
registry.declare(
    "assign_columns",
    "(Tensor target, Tensor scale, Tensor factors, str format) -> (Tensor indices, Tensor lost)",
    _check_assign,
    lambda target, *rest: (torch.empty_like(target, dtype=torch.uint8), torch.empty_like(target)),
)
