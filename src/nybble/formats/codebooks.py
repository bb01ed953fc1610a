"""As tensors: what indices of four, three and two bits, and the eight-bit codes of double quantisation, stand for.

Levels are those of nybble.formats.format. Each table is made once for each device and shared: do not write into one.
"""

import functools

import torch
from torch import Tensor

from nybble.formats.format import named_format

CPU = torch.device("cpu")


@functools.cache
def codebook(format: str, device: torch.device = CPU) -> Tensor:
    """The levels of a format, fp32 `[2 ** bits]`, by index.

    Raises:
        FormatError: unknown format.
    """
    return torch.tensor(named_format(format).levels, dtype=torch.float32, device=device)


@functools.cache
def sorted_order(format: str, device: torch.device = CPU) -> Tensor:
    """The indices of a format from its least to its greatest level, uint8 `[2 ** bits]`."""
    return torch.tensor(named_format(format).order, dtype=torch.uint8, device=device)


@functools.cache
def midpoints(format: str, device: torch.device = CPU) -> Tensor:
    """Where rounding passes from one value to the next, fp32 `[2 ** bits - 1]`, ascending.

    A value that equals a midpoint rounds to the lower neighbour, as in bitsandbytes.
    """
    values = codebook(format)[sorted_order(format).long()]
    return ((values[:-1] + values[1:]) / 2).to(device)


def nearest_indices(scaled: Tensor, format: str) -> Tensor:
    """The index of the level nearest to each element, uint8; ties go to the lower level."""
    position = torch.bucketize(scaled, midpoints(format, scaled.device), out_int32=True)
    return sorted_order(format, scaled.device)[position]


@functools.cache
def dynamic_map(device: torch.device = CPU, signed: bool = True) -> Tensor:
    """The 8-bit dynamic map, ascending, fp32 `[256]`.

    Seven decades, of which decade i = 0..6 has 2^i values: +-10^(i - 6) times the midpoints of
    linspace(0.1, 1, 2^i + 1); with 0 and 1 that makes 256. Without signs a decade has twice as many, all positive.
    (Dettmers 2015, arXiv 1511.04561; as `create_dynamic_map` of bitsandbytes builds it, in the same precisions, so
    that the bits agree.)
    """
    values = [0.0, 1.0]
    for i in range(7):
        count = 2**i if signed else 2 ** (i + 1)
        boundaries = torch.linspace(0.1, 1, count + 1, dtype=torch.float32, device=CPU)
        decade = (boundaries[:-1] + boundaries[1:]) / 2 * 10 ** (i - 6)
        values += decade.tolist() + ((-decade).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@functools.cache
def dynamic_midpoints(device: torch.device = CPU, signed: bool = True) -> Tensor:
    """Where rounding passes from one value of the dynamic map to the next, fp32 `[255]`; it rounds to the lower."""
    values = dynamic_map(CPU, signed)
    return ((values[:-1] + values[1:]) / 2).to(device)
