"""QuantizedTensor: a matrix in four, three or two bits, as two uint8 tensors and the facts needed to read them.

Layout of `scales` (one uint8 tensor, so that safetensors, FSDP2, DDP and deepcopy need no help;
32-bit fields come first, which keeps them aligned), with B = ceil(n / block_size) blocks:

    double_quant:  offset f32 [1] | absmax2 f32 [ceil(B / 256)] | codes u8 [B]
    otherwise:     absmax f32 [B]
    int4_asym:     ... | zero_points u8 [B]          (appended to either)

Layout of `packed`, over the row-major flattened matrix:

    four bits:     byte j holds elements 2j (high nibble) and 2j + 1 (low nibble); an odd count is padded with the
                   index of zero
    nf2:           byte j holds elements 4j to 4j + 3, the first in the lowest two bits
    nf3:           each block of n elements is two planes, [ceil(n / 4)] and [ceil(n / 8)] bytes: the low two bits of
                   its indices as in nf2, then their third bits, the first in the lowest bit. Eight bytes and four
                   make 32 elements, and a mask register takes the third bits as they lie.

In nf2 and nf3 the bits that no element fills are zero. A whole block is a whole number of bytes in every format.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from nybble.errors import FormatError

NESTED_BLOCK_SIZE = 256  # scales per double-quantisation block
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
BITS = {"nf4": 4, "fp4": 4, "int4": 4, "int4_asym": 4, "nf3": 3, "nf2": 2}
FORMATS = tuple(BITS)


@dataclass(frozen=True)
class QuantSpec:
    """How a matrix is quantised.

    Args:
        format: one of `FORMATS`.
        block_size: consecutive elements that share a scale, one of `BLOCK_SIZES`.
        double_quant: whether the scales are themselves quantised to 8 bits.
    """

    format: str = "nf4"
    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise FormatError(f"Unknown format {self.format!r}.", f"Known formats: {', '.join(FORMATS)}.")
        if self.block_size not in BLOCK_SIZES:
            raise FormatError(
                f"Block size {self.block_size} is not supported.",
                f"Allowed: {', '.join(map(str, BLOCK_SIZES))}.",
            )

    def num_blocks(self, numel: int) -> int:
        return -(-numel // self.block_size)

    @property
    def bits(self) -> int:
        """Of an index."""
        return BITS[self.format]

    def packed_bytes(self, numel: int) -> int:
        whole = numel - numel % self.block_size
        rest = numel - whole
        planes = (4,) if self.bits == 4 else (2, 1)[: self.bits - 1]
        return whole * self.bits // 8 + sum(-(-rest * bits // 8) for bits in planes)

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of `packed`: rows stay whole (so that a row range is a byte range) where no block straddles two of them."""
        if len(shape) == 2 and shape[1] % self.block_size == 0:
            return (shape[0], shape[1] * self.bits // 8)
        return (self.packed_bytes(prod(shape)),)

    def scales_bytes(self, numel: int) -> int:
        num_blocks = self.num_blocks(numel)
        zero_points = num_blocks if self.format == "int4_asym" else 0
        if not self.double_quant:
            return 4 * num_blocks + zero_points
        return 4 + 4 * -(-num_blocks // NESTED_BLOCK_SIZE) + num_blocks + zero_points

    def bytes(self, numel: int) -> int:
        """Bytes that a matrix of `numel` elements takes, scales included."""
        return self.packed_bytes(numel) + self.scales_bytes(numel)


LayerSpecs = Mapping[str, QuantSpec]  # by the layer's name


def spec_of(specs: QuantSpec | LayerSpecs, layer: str) -> QuantSpec:
    """How one layer is quantised: all alike, or each by its own entry."""
    return specs if isinstance(specs, QuantSpec) else specs[layer]


class ScaleParts(NamedTuple):
    """Views into a `scales` tensor; absent parts are None."""

    absmax: Tensor | None  # f32 [B], when not double-quantised
    offset: Tensor | None  # f32 [1]
    absmax2: Tensor | None  # f32 [ceil(B / 256)]
    codes: Tensor | None  # u8 [B]
    zero_points: Tensor | None  # u8 [B]


def split_scales(scales: Tensor, spec: QuantSpec, numel: int) -> ScaleParts:
    """Views of each part of `scales`; nothing is copied.

    Raises:
        FormatError: the tensor is not as long as the layout says.
    """
    expected = spec.scales_bytes(numel)
    if scales.numel() != expected:
        raise FormatError(f"A scales tensor has {scales.numel()} bytes; {spec} over {numel} elements needs {expected}.")
    num_blocks = spec.num_blocks(numel)
    zero_points = scales[-num_blocks:] if spec.format == "int4_asym" else None
    if not spec.double_quant:
        return ScaleParts(scales[: 4 * num_blocks].view(torch.float32), None, None, None, zero_points)
    end = 4 + 4 * -(-num_blocks // NESTED_BLOCK_SIZE)
    return ScaleParts(
        None,
        scales[:4].view(torch.float32),
        scales[4:end].view(torch.float32),
        scales[end : end + num_blocks],
        zero_points,
    )


def join_scales(parts: ScaleParts) -> Tensor:
    """The inverse of `split_scales`: one uint8 tensor."""
    present = (parts.absmax, parts.offset, parts.absmax2, parts.codes, parts.zero_points)
    return torch.cat([part.reshape(-1).view(torch.uint8) for part in present if part is not None])


@dataclass(frozen=True)
class QuantizedTensor:
    """A frozen matrix in four, three or two bits.

    Args:
        packed: uint8, shape `spec.packed_shape(shape)`.
        scales: uint8 `[spec.scales_bytes(numel)]`.
        spec: format, block size, double quantisation.
        shape: of the matrix, `(out_features, in_features)` for a linear layer.
        dtype: of the matrix it was made from; bitsandbytes records it.
    """

    packed: Tensor
    scales: Tensor
    spec: QuantSpec
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        expected = self.spec.packed_shape(self.shape)
        assert self.packed.dtype == self.scales.dtype == torch.uint8
        assert tuple(self.packed.shape) == expected, (tuple(self.packed.shape), expected)
        assert self.scales.numel() == self.spec.scales_bytes(self.numel)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.packed.numel() + self.scales.numel()

    def scale_parts(self) -> ScaleParts:
        return split_scales(self.scales, self.spec, self.numel)
