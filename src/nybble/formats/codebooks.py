"""The values that indices of four, three and two bits, and the eight-bit codes of double quantisation, stand for.

An index means `codebook(format)[index] * scale of its block`; for int4_asym it means
`(codebook(format)[index] - zero point) * scale`.

Each table is made once for each device and shared: do not write into one.
"""

import functools

import torch
from torch import Tensor

from nybble.errors import FormatError

CPU = torch.device("cpu")

# NF4 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, appendix E): quantiles of the standard normal
# distribution. With o = ((1 - 1/30) + (1 - 1/32)) / 2 and F the normal distribution function, the
# positive levels are F^-1 of linspace(o, 1/2, 9) without its end, the negative ones minus F^-1 of
# linspace(o, 1/2, 8) without its end; with a zero, sorted, divided by the largest. The digits below are
# those of bitsandbytes, whose own computation is off the exact quantiles by up to 2e-7.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# FP4: sign, two exponent bits, one mantissa bit, in the index order of bitsandbytes' kernels, divided
# by the largest value. Index 8 is a second zero (plus zero, as in bitsandbytes).
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)

# The FP4 indices from the least to the greatest value; of the two zeros, index 0 comes first. This is the
# order bitsandbytes rounds in, so x = 0 and small negative x get index 0, small positive x get index 8.
_FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)


# NF3 and NF2: the levels of least squared error for blocks of 64 values of the normal distribution, each divided by
# its value of largest magnitude, sign included, so that this value becomes +1 (block-wise optimal floats with signed
# normalisation: Blumenberg et al. 2025, arXiv 2505.06653). A level q is where Lloyd's iteration stays: over the cell
# of values nearest to it, q = E[m x] / E[m^2], with m the value of largest magnitude and x the value.
# NF4's own construction with 8 and 4 levels loses 1.3 and 2.6 times as much on real weights: two levels at +-1 are
# too many where there are few, and so is a zero (benchmarks/calibration/low_bit_codebooks.py).
_NF3 = (
    -0.729783530, -0.450361283, -0.238319732, -0.051412570,
    0.130728255, 0.325412858, 0.558676118, 0.901335116,
)  # fmt: skip
_NF2 = (-0.523921051, -0.127717484, 0.219280849, 0.659349034)
_SIGNED = ("nf3", "nf2")


@functools.cache
def codebook(format: str, device: torch.device = CPU) -> Tensor:
    """The values of a format, fp32 `[2 ** bits]`, by index.

    - nf4, fp4: as bitsandbytes, greatest magnitude 1.
    - int4: index i is (i - 8) / 7, so that absmax is level 7; rounding to the nearest level never needs
      index 0, which is free for scale searches.
    - int4_asym: index i is i.
    - nf3, nf2: 8 and 4 ascending levels; the value of largest magnitude of a block is positive after division.

    Raises:
        FormatError: unknown format.
    """
    if format == "nf4":
        return torch.tensor(_NF4, dtype=torch.float32, device=device)
    if format == "fp4":
        return (torch.tensor(_FP4_TWELFTHS, dtype=torch.float32, device=CPU) / 12).to(device)
    if format == "int4":
        return (torch.arange(-8, 8, dtype=torch.float32, device=CPU) / 7).to(device)
    if format == "int4_asym":
        return torch.arange(16, dtype=torch.float32, device=device)
    if format in ("nf3", "nf2"):
        return torch.tensor(_NF3 if format == "nf3" else _NF2, dtype=torch.float32, device=device)
    raise FormatError(f"Unknown format {format!r}.", "Known formats: nf4, fp4, int4, int4_asym, nf3, nf2.")


@functools.cache
def sorted_order(format: str, device: torch.device = CPU) -> Tensor:
    """The indices of a format from its least to its greatest value, uint8 `[2 ** bits]`."""
    order = _FP4_ORDER if format == "fp4" else range(len(codebook(format)))
    return torch.tensor(order, dtype=torch.uint8, device=device)


@functools.cache
def midpoints(format: str, device: torch.device = CPU) -> Tensor:
    """Where rounding passes from one value to the next, fp32 `[2 ** bits - 1]`, ascending.

    A value that equals a midpoint rounds to the lower neighbour, as in bitsandbytes.
    """
    values = codebook(format)[sorted_order(format).long()]
    return ((values[:-1] + values[1:]) / 2).to(device)


def zero_index(format: str) -> int:
    """The index that x = 0 gets, for the four-bit formats without zero points."""
    return {"nf4": 7, "fp4": 0, "int4": 8}[format]


def is_signed(format: str) -> bool:
    """Whether a block's scale carries the sign of its value of largest magnitude."""
    return format in _SIGNED


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
