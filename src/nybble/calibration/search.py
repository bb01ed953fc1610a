"""Scales that lose least, in the bytes the format has anyway.

Quantising by absmax lets each block's largest weight decide its scale. Searching chooses the scale, of either sign,
under which the block's nearest levels lose least:

    from s in {+-0.8, +-0.9, +-1, +-1.1} * absmax, twice:  c = nearest levels of w / s;  s = sum h w c / sum h c^2
    keep the least sum h (w - s c)^2,   absmax itself among the candidates

h is how much an error in a column counts: 1 without data, the diagonal of XᵀX with it. Double-quantised scales are
searched twice: the first time decides the grid of 256 values that the scales of each 256 blocks may have, the second
time every candidate is judged as the grid rounds it.
"""

import torch
from torch import Tensor

from nybble.errors import FormatError
from nybble.formats.blockwise import not_finite, pack_indices
from nybble.formats.double_quant import quantize_scales
from nybble.formats.format import FORMATS
from nybble.formats.quant_spec import NESTED_BLOCK_SIZE, QuantSpec
from nybble.formats.quantized_tensor import QuantizedTensor, ScaleParts, join_scales
from nybble.kernels.ops.calibration import FoundScales, ScaleGrid, search_scales
from nybble.kernels.ops.four_bit import quantize

STARTS = (0.8, 0.9, 1.0, 1.1)  # multiples of absmax that the search begins from


def search_weight(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None = None, signs: tuple[int, ...] = (1, -1)
) -> QuantizedTensor:
    """Put a weight into four bits under searched scales.

    Args:
        weight: any shape, fp32, bf16 or fp16; not changed.
        importance: fp32 `[in_features]`, how much an error in each column counts; all alike where None.
        signs: of the scales that are tried.

    Raises:
        FormatError: values that are not finite, or a format with zero points.
    """
    check_searchable(spec.format)
    wide = weight.detach().float().contiguous()
    if not torch.isfinite(wide).all():
        raise not_finite(wide.view(-1))
    found, grid = search_on_grid(wide, spec, importance, signs)
    return assemble(found.indices, found.scale, found.codes, grid, spec, weight.dtype)


def round_weight(weight: Tensor, spec: QuantSpec, rounding: str) -> QuantizedTensor:
    """Put a weight into few bits without data; `rounding` is "absmax" or "search"."""
    return quantize(weight, spec) if rounding == "absmax" else search_weight(weight, spec)


def search_on_grid(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None, signs: tuple[int, ...] = (1, -1)
) -> tuple[FoundScales, ScaleGrid | None]:
    """Searched scales of an fp32 weight, and where they may lie when they are double-quantised."""
    starts = [sign * start for sign in signs for start in STARTS]
    found = search_scales(weight, spec.format, spec.block_size, starts, importance)
    if not spec.double_quant:
        return found, None
    grid = scale_grid(found.scale)
    return search_scales(weight, spec.format, spec.block_size, starts, importance, grid), grid


def scale_grid(scale: Tensor) -> ScaleGrid:
    """The values that double quantisation allows near these scales, fp32 `[B]`."""
    _, absmax2, offset = quantize_scales(scale)
    return ScaleGrid(absmax2.repeat_interleave(NESTED_BLOCK_SIZE)[: len(scale)].contiguous(), offset)


def assemble(
    indices: Tensor, scale: Tensor, codes: Tensor, grid: ScaleGrid | None, spec: QuantSpec, dtype: torch.dtype
) -> QuantizedTensor:
    """The four-bit tensor of these levels and scales.

    Args:
        indices: uint8, the weight's shape.
        scale: fp32 `[B]`, stored where there is no grid; else `codes`, uint8 `[B]`, and the grid are.
        dtype: of the weight it was made from.
    """
    if grid is None:
        parts = ScaleParts(absmax=scale)
    else:
        firsts = torch.arange(0, len(grid.step), NESTED_BLOCK_SIZE, device=codes.device)
        parts = ScaleParts(None, grid.offset, grid.step[firsts], codes)
    shape = tuple(indices.shape)
    packed = pack_indices(indices.reshape(-1), spec).view(spec.packed_shape(shape))
    return QuantizedTensor(packed, join_scales(parts), spec, shape, dtype)


def check_searchable(format: str) -> None:
    """Refuse formats whose blocks have zero points.

    Raises:
        FormatError: `format` is one.
    """
    if not FORMATS[format].searchable:
        raise FormatError(
            f"{format} has zero points; its scales cannot be searched.",
            f"Searched and calibrated: {', '.join(each.name for each in FORMATS.values() if each.searchable)}.",
            "Use --quality absmax, or another --format.",
        )
