"""QuantizedTensor: a matrix in four, three or two bits, as two uint8 tensors and the facts needed to read them.

Layout of `scales` (one uint8 tensor, so that safetensors, FSDP2, DDP and deepcopy need no help;
32-bit fields come first, which keeps them aligned), with B = ceil(n / block_size) blocks:

    double_quant:  offset f32 [1] | absmax2 f32 [ceil(B / 256)] | codes u8 [B]
    otherwise:     absmax f32 [B]
    zero points:   ... | zero_points u8 [B]          (appended to either, where the format has them)

Layout of `packed`, over the row-major flattened matrix:

    four bits:     byte j holds elements 2j (high nibble) and 2j + 1 (low nibble); an odd count is padded with the
                   index of zero
    nf2:           byte j holds elements 4j to 4j + 3, the first in the lowest two bits
    nf3:           each block of n elements is two planes, [ceil(n / 4)] and [ceil(n / 8)] bytes: the low two bits of
                   its indices as in nf2, then their third bits, the first in the lowest bit. Eight bytes and four
                   make 32 elements, and a mask register takes the third bits as they lie.

    ggml's blocks: each block's own bytes, scales among them (`ggml_blocks.py`); `scales` is empty

In nf2 and nf3 the bits that no element fills are zero. A whole block is a whole number of bytes in every format.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from nybble.errors import FormatError
from nybble.formats.quant_spec import NESTED_BLOCK_SIZE, QuantSpec


class ScaleParts(NamedTuple):
    """Views into a `scales` tensor; absent parts are None."""

    absmax: Tensor | None = None  # f32 [B], when not double-quantised
    offset: Tensor | None = None  # f32 [1]
    absmax2: Tensor | None = None  # f32 [ceil(B / 256)]
    codes: Tensor | None = None  # u8 [B]
    zero_points: Tensor | None = None  # u8 [B]


def split_scales(scales: Tensor, spec: QuantSpec, numel: int) -> ScaleParts:
    """Views of each part of `scales`; nothing is copied.

    Raises:
        FormatError: the tensor is not as long as the layout says.
    """
    expected = spec.scales_bytes(numel)
    if scales.numel() != expected:
        raise FormatError(f"A scales tensor has {scales.numel()} bytes; {spec} over {numel} elements needs {expected}.")
    num_blocks = spec.num_blocks(numel)
    zero_points = scales[-num_blocks:] if spec.entry.zero_points else None
    if not spec.double_quant:
        return ScaleParts(absmax=scales[: 4 * num_blocks].view(torch.float32), zero_points=zero_points)
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

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        """The same on another device."""
        return replace(self, packed=self.packed.to(device), scales=self.scales.to(device))

    def rows(self, start: int, stop: int) -> "QuantizedTensor":
        """Some of the rows, as a matrix of their own; nothing but scales is copied.

        Args:
            start, stop: multiples of the spec's `row_multiple`, or the last.
        """
        columns, size = self.shape[1], self.spec.block_size
        multiple = self.spec.row_multiple(columns)
        assert multiple and start % multiple == 0 and (stop % multiple == 0 or stop == self.shape[0]), (start, stop)
        blocks = slice(start * columns // size, stop * columns // size)
        nested = slice(blocks.start // NESTED_BLOCK_SIZE, -(-blocks.stop // NESTED_BLOCK_SIZE))
        absmax, offset, absmax2, codes, zero_points = self.scale_parts() if self.scales.numel() else ScaleParts()
        parts = ScaleParts(
            None if absmax is None else absmax[blocks],
            offset,
            None if absmax2 is None else absmax2[nested],
            None if codes is None else codes[blocks],
            None if zero_points is None else zero_points[blocks],
        )
        scales = join_scales(parts) if self.scales.numel() else self.scales
        return replace(self, packed=self.packed[start:stop], scales=scales, shape=(stop - start, columns))

    def scale_parts(self) -> ScaleParts:
        return split_scales(self.scales, self.spec, self.numel)
