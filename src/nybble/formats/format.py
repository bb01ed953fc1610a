"""The formats that a weight's bits can have: one table. What differs between formats is asked of their entries.

Plain numbers only, so that what a model takes can be counted without torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nybble.errors import FormatError


@dataclass(frozen=True)
class Block:
    """Consecutive elements of a row whose bytes hold their scales too.

    Args:
        size: elements. num_bytes: that they take.
    """

    size: int
    num_bytes: int


@dataclass(frozen=True)
class Format:
    """What an index of a format stands for: `levels[index] * scale of its block`, or, with zero points,
    `(levels[index] - zero point) * scale`. How scales and indices are chosen: nybble.formats.blockwise.

    Args:
        name: of options, files and ops.
        levels: by index; 16, 8 or 4 of them.
        ascending: the indices from the least to the greatest level, where that is not their own order.
        signed: a scale carries the sign of its block's value of largest magnitude.
        zero_points: each block has a level of its own that stands for zero, and levels are the integers from 0.
        bitsandbytes: it reads and writes the format, under the same name.
        mixable: a choice of --mixed.
        block: of a format that is read and never made, whose scales lie among its codes; it has no levels.
    """

    name: str
    levels: tuple[float, ...]
    ascending: tuple[int, ...] | None = None
    signed: bool = False
    zero_points: bool = False
    bitsandbytes: bool = False
    mixable: bool = False
    block: Block | None = None

    @property
    def bits(self) -> int:
        """Bits of one index; 0 of a format without."""
        if self.block is not None:
            return 0
        return (len(self.levels) - 1).bit_length()

    @property
    def order(self) -> Sequence[int]:
        """The indices from the least to the greatest level."""
        return self.ascending or range(len(self.levels))

    @property
    def zero_index(self) -> int:
        """The index that x = 0 gets, without zero points: of the level nearest to it, of two such the first."""
        return min(self.order, key=lambda index: abs(self.levels[index]))

    @property
    def searchable(self) -> bool:
        """Whether scales are searched and levels calibrated: zero points would have to be searched with them."""
        return not self.zero_points and self.block is None


# NF4 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, appendix E): quantiles of the standard normal
# distribution. With o = ((1 - 1/30) + (1 - 1/32)) / 2 and F the normal distribution function, the
# positive levels are F^-1 of linspace(o, 1/2, 9) without its end, the negative ones minus F^-1 of
# linspace(o, 1/2, 8) without its end; with a zero, sorted, divided by the largest. The digits below are
# those of bitsandbytes, whose own computation is off the exact quantiles by up to 2e-7.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# FP4: sign, two exponent bits, one mantissa bit, in the index order of bitsandbytes' kernels, divided
# by the largest value. Index 8 is a second zero (plus zero, as in bitsandbytes).
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)

# The FP4 indices from the least to the greatest value; of the two zeros, index 0 comes first. This is the
# order bitsandbytes rounds in, so x = 0 and small negative x get index 0, small positive x get index 8.
_FP4_ASCENDING = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)

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

_TABLE = (
    Format("nf4", _NF4, bitsandbytes=True, mixable=True),
    Format("fp4", tuple(value / 12 for value in _FP4_TWELFTHS), _FP4_ASCENDING, bitsandbytes=True),
    # absmax is level 7: rounding to the nearest level never needs index 0, which is free for scale searches.
    Format("int4", tuple(value / 7 for value in range(-8, 8))),
    Format("int4_asym", tuple(range(16)), zero_points=True),
    Format("nf3", _NF3, signed=True, mixable=True),
    Format("nf2", _NF2, signed=True, mixable=True),
)
FORMATS = {format.name: format for format in _TABLE}
_BLOCKS = {  # ggml's, see ggml_blocks.py
    "q4_0": Block(32, 18), "q8_0": Block(32, 34), "iq4_nl": Block(32, 18), "q4_k": Block(256, 144),
    "q5_k": Block(256, 176), "q6_k": Block(256, 210), "iq4_xs": Block(256, 136),
}  # fmt: skip
STORED_FORMATS = {name: Format(name, (), block=block) for name, block in _BLOCKS.items()}
STORED = "stored"  # for users: whichever a file has
DEFAULT_FORMAT = "nf4"  # where none is named


def named_format(name: str) -> Format:
    """The entry of that name.

    Raises:
        FormatError: there is none.
    """
    known = FORMATS | STORED_FORMATS
    if name not in known:
        raise FormatError(f"Unknown format {name!r}.", f"Known formats: {', '.join(known)}.")
    return known[name]
