import torch
from torch import Tensor

from nybble.formats import codebooks
from nybble.formats.double_quant import MIN_SCALE
from nybble.kernels import registry

REFITS = 2


@registry.register("search_scales", "reference")
def search_scales(
    weight: Tensor,
    importance: Tensor,
    step: Tensor | None,
    offset: Tensor | None,
    format: str,
    block_size: int,
    starts: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    numel = weight.numel()
    blocks = -(-numel // block_size)
    w = weight.new_zeros(blocks * block_size)
    w[:numel] = weight.reshape(-1)
    h = torch.zeros_like(w)  # what lies beyond the end counts nothing
    h[:numel] = importance.repeat(-(-numel // importance.numel()))[:numel]
    w, h = w.view(blocks, block_size), h.view(blocks, block_size)
    largest = w.abs().amax(1)

    best, codes = round_to_grid(largest, step, offset)
    least = _error(w, h, best, format)
    for start in starts:
        scale = start * largest
        for _ in range(REFITS):
            level = nearest_values(w * _inverse(scale)[:, None], format)
            square = (h * level * level).sum(1)
            refitted = (h * w * level).sum(1) / square
            refitted = torch.where(square > 0, refitted, 0.0)
            scale = torch.where(scale.abs() > MIN_SCALE, refitted, scale)
        rounded, rounded_codes = round_to_grid(scale, step, offset)
        error = _error(w, h, rounded, format)
        better = (error < least) & (scale.abs() > MIN_SCALE)
        least = torch.where(better, error, least)
        best = torch.where(better, rounded, best)
        codes = torch.where(better, rounded_codes, codes)

    indices = codebooks.nearest_indices(w * _inverse(best)[:, None], format).view(-1)[:numel]
    return best, codes, indices.view(weight.shape)


@registry.register("assign_columns", "reference")
def assign_columns(target: Tensor, scale: Tensor, factors: Tensor, format: str) -> tuple[Tensor, Tensor]:
    wanted, inverse = target.clone(), _inverse(scale)
    indices, lost = torch.empty_like(target, dtype=torch.uint8), torch.empty_like(target)
    values = codebooks.codebook(format, target.device)
    for row in range(len(target)):
        indices[row] = codebooks.nearest_indices(wanted[row] * inverse, format)
        q = values[indices[row].long()] * scale
        lost[row] = wanted[row] - q
        wanted[row + 1 :] -= lost[row] * factors[row, row + 1 :, None]
    return indices, lost


def round_to_grid(scale: Tensor, step: Tensor | None, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """The nearest value of each block's grid and its code; the scale itself and zeros where there is no grid."""
    if step is None or offset is None:
        return scale, torch.zeros_like(scale, dtype=torch.uint8)
    values = codebooks.dynamic_map(scale.device)
    midpoints = (values[:-1] + values[1:]) / 2
    codes = torch.bucketize((scale - offset) * (1.0 / step.clamp(min=MIN_SCALE)), midpoints)
    return values[codes] * step + offset, codes.to(torch.uint8)


def nearest_values(scaled: Tensor, format: str) -> Tensor:
    """The level nearest to each element."""
    return codebooks.codebook(format, scaled.device)[codebooks.nearest_indices(scaled, format).long()]


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def _error(w: Tensor, h: Tensor, scale: Tensor, format: str) -> Tensor:
    lost = w - nearest_values(w * _inverse(scale)[:, None], format) * scale[:, None]
    return (h * lost * lost).sum(1)
