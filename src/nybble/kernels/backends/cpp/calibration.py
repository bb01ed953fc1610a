"""csrc/calibrate.cpp."""

import torch
from torch import Tensor

from nybble.formats import codebooks
from nybble.kernels import registry
from nybble.kernels.backends.cpp.four_bit import code_search
from nybble.kernels.backends.cpp.library import FLOAT, INT, INT64, POINTER, function, pointer

_LEVELS = (POINTER, POINTER, POINTER, INT)
_search_scales = function(
    "search_scales", POINTER, INT64, INT64, POINTER, INT64, POINTER, FLOAT, POINTER, POINTER, POINTER, *_LEVELS,
    POINTER, INT, POINTER, POINTER, POINTER,
)  # fmt: skip
_assign_columns = function("assign_columns", POINTER, INT64, INT64, *[POINTER] * 2, *_LEVELS, POINTER, POINTER)


@registry.register("search_scales", "cpp")
def search_scales(
    weight: Tensor,
    importance: Tensor,
    step: Tensor | None,
    offset: Tensor | None,
    format: str,
    block_size: int,
    starts: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    scale = weight.new_empty(-(-weight.numel() // block_size))
    codes, indices = torch.zeros_like(scale, dtype=torch.uint8), torch.empty_like(weight, dtype=torch.uint8)
    midpoints, first_code = code_search()
    multiples = torch.tensor(starts, dtype=torch.float32)
    _search_scales(
        pointer(weight), weight.numel(), block_size, pointer(importance), importance.numel(),
        pointer(step), 0.0 if offset is None else offset.item(), pointer(codebooks.dynamic_map()), pointer(midpoints),
        pointer(first_code), *_levels(format), pointer(multiples), len(starts),
        pointer(scale), pointer(codes), pointer(indices),
    )  # fmt: skip
    return scale, codes, indices


@registry.register("assign_columns", "cpp")
def assign_columns(target: Tensor, scale: Tensor, factors: Tensor, format: str) -> tuple[Tensor, Tensor]:
    indices, lost = torch.empty_like(target, dtype=torch.uint8), torch.empty_like(target)
    _assign_columns(
        pointer(target), *target.shape, pointer(scale), pointer(factors), *_levels(format),
        pointer(indices), pointer(lost),
    )  # fmt: skip
    return indices, lost


def _levels(format: str) -> tuple[int | None, ...]:
    """Values, midpoints, order and number of a format's levels, as the kernels take them."""
    values = codebooks.codebook(format)
    return pointer(values), pointer(codebooks.midpoints(format)), pointer(codebooks.sorted_order(format)), len(values)
