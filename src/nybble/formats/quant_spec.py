"""How matrices are quantised, and how many bytes that takes: plain numbers, without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import gcd, prod

from nybble.errors import FormatError
from nybble.formats.format import DEFAULT_FORMAT, Format, named_format

NESTED_BLOCK_SIZE = 256  # scales per double-quantisation block
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class QuantSpec:
    """How a matrix is quantised.

    Args:
        format: name of an entry of `FORMATS` or `STORED_FORMATS`.
        block_size: consecutive elements that share a scale, one of `BLOCK_SIZES`.
        double_quant: whether the scales are themselves quantised to 8 bits.

    Raises:
        FormatError: unknown format or block size.
    """

    format: str = DEFAULT_FORMAT
    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        block = named_format(self.format).block
        if block is not None and (self.block_size, self.double_quant) != (block.size, False):
            raise FormatError(f"{self} is no way to store {self.format}.", f"Needed: {stored_spec(self.format)}.")
        if self.block_size not in BLOCK_SIZES:
            raise FormatError(
                f"Block size {self.block_size} is not supported.", f"Allowed: {', '.join(map(str, BLOCK_SIZES))}."
            )

    @property
    def entry(self) -> Format:
        """The format's line in the table."""
        return named_format(self.format)

    def num_blocks(self, numel: int) -> int:
        return -(-numel // self.block_size)

    @property
    def bits(self) -> int:
        """Bits of one index."""
        return self.entry.bits

    def packed_bytes(self, numel: int) -> int:
        if (block := self.entry.block) is not None:
            return numel // block.size * block.num_bytes
        whole = numel - numel % self.block_size
        rest = numel - whole
        planes = (4,) if self.bits == 4 else (2, 1)[: self.bits - 1]
        return whole * self.bits // 8 + sum(-(-rest * bits // 8) for bits in planes)

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of `packed`: rows stay whole (a row range is a byte range) where no block straddles two of them."""
        if len(shape) == 2 and shape[1] % self.block_size == 0:
            return (shape[0], self.packed_bytes(shape[1]))
        return (self.packed_bytes(prod(shape)),)

    def row_multiple(self, width: int) -> int:
        """After every so many rows of this width ends a block of scales too; 0 where blocks straddle rows."""
        block = self.block_size * (NESTED_BLOCK_SIZE if self.double_quant else 1)
        return 0 if width % self.block_size else block // gcd(block, width)

    def scales_bytes(self, numel: int) -> int:
        if self.entry.block is not None:
            return 0
        num_blocks = self.num_blocks(numel)
        zero_points = num_blocks if self.entry.zero_points else 0
        if not self.double_quant:
            return 4 * num_blocks + zero_points
        return 4 + 4 * -(-num_blocks // NESTED_BLOCK_SIZE) + num_blocks + zero_points

    def bytes(self, numel: int) -> int:
        """Bytes that a matrix of `numel` elements takes, scales included."""
        return self.packed_bytes(numel) + self.scales_bytes(numel)


def stored_spec(format: str) -> QuantSpec:
    """How a matrix of blocks that hold their own scales is stored."""
    block = named_format(format).block
    assert block is not None, format
    return QuantSpec(format, block.size, False)


@dataclass(frozen=True)
class BaseFormats:
    """How the linear layers of a base are quantised: all alike, or each in a format of its own.

    A base that stays in 16 bits has none.

    Args:
        spec: of every layer; where they have formats of their own, of which block size and double quantisation hold.
        layers: layer -> format, of all that are quantised; empty where they are alike.

    Raises:
        FormatError: a layer's format is unknown.
    """

    spec: QuantSpec = QuantSpec()
    layers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for format in self.layers.values():
            named_format(format)

    @property
    def names(self) -> list[str]:
        """The formats that layers have, each once."""
        return list(dict.fromkeys(self.layers.values())) or [self.spec.format]

    def of(self, layer: str) -> QuantSpec:
        """How one layer is quantised."""
        format = self.layers[layer] if self.layers else self.spec.format
        return self.spec if format == self.spec.format else self._in_format(format)

    def _in_format(self, format: str) -> QuantSpec:
        return replace(self.spec, format=format) if named_format(format).block is None else stored_spec(format)
