"""Quantise and dequantise in plain PyTorch: the truth every kernel is tested against.

A matrix is flattened row-major; each block of `block_size` consecutive elements has one fp32 scale.
All arithmetic is fp32:

    nf4, fp4, int4   scale = max |x|;  index = nearest(x * (1 / scale)), ties to the lower value
                     value = codebook[index] * scale
    nf3, nf2         scale = the value of largest magnitude, sign included (of two such, the positive one);
                     index = nearest(x * (1 / scale)), ties to the lower value;  value = codebook[index] * scale
    int4_asym        range = [min(x, 0), max(x, 0)];  scale = its length / 15;  r = 1 / scale
                     zero point = clamp(round(-min * r), 0, 15)
                     index = clamp(round(x * r) + zero point, 0, 15);  value = (index - zero point) * scale
                     (round half to even; zero is always exact)

In divisions a scale below 1e-38 counts as 1e-38. nf4 and fp4 give bitsandbytes' bytes and scales, one
oddity included: a last block that is not full is divided by its scale instead of multiplied by the
reciprocal, and its stored scale is never below 1e-38. int4 follows the same rule; the others have no such
exception. With double quantisation the indices and zero points are those of the exact scale, as in
bitsandbytes; only the scale stored afterwards is rounded. How indices become bytes is in
nybble.formats.quantized_tensor.

The work goes panel by panel, so that a big matrix needs only some megabytes beyond source and result.
"""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.errors import FormatError
from nybble.formats import codebooks
from nybble.formats.double_quant import MIN_SCALE, dequantize_scales, scale_parts
from nybble.formats.quant_spec import QuantSpec
from nybble.formats.quantized_tensor import QuantizedTensor, join_scales

PANEL = 1 << 19  # elements at a time: 2 MB in fp32, about what the caches of two cores hold


def quantize(w: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """Put a weight into four, three or two bits.

    Args:
        w: any shape with at least one element, fp32, bf16 or fp16; not changed.

    Raises:
        FormatError: empty, or with values that are not finite.
    """
    if w.numel() == 0:
        raise FormatError(f"A weight of shape {tuple(w.shape)} has no elements to quantise.")
    flat = w.detach().reshape(-1)
    packed = torch.empty(spec.packed_bytes(flat.numel()), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(spec.num_blocks(flat.numel()), dtype=torch.float32, device=w.device)
    zero_points = torch.empty_like(absmax, dtype=torch.uint8) if spec.entry.zero_points else None

    for start, stop, width in _panels(flat.numel(), spec.block_size):
        x = flat[start:stop].float().view(-1, width)  # (blocks, width)
        blocks = slice(start // spec.block_size, start // spec.block_size + len(x))
        if zero_points is not None:
            indices, absmax[blocks], zero_points[blocks] = _affine_levels(x)
        elif spec.entry.signed:
            indices, absmax[blocks] = _nearest_levels_signed(x, spec)
        else:
            indices, absmax[blocks] = _nearest_levels(x, spec)
        packed[spec.packed_bytes(start) : spec.packed_bytes(stop)] = pack_indices(indices.view(-1), spec, zero_points)

    if not torch.isfinite(absmax).all():
        raise not_finite(flat)
    parts = scale_parts(absmax, spec.double_quant, zero_points)
    shape = tuple(w.shape)
    return QuantizedTensor(packed.view(spec.packed_shape(shape)), join_scales(parts), spec, shape, w.dtype)


def dequantize(q: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """The weight back, in `q.shape`: fp32 arithmetic, then one rounding to `dtype`."""
    out = torch.empty(q.shape, dtype=dtype, device=q.packed.device)
    dequantize_into(q, out)
    return out


def dequantize_into(q: QuantizedTensor, out: Tensor) -> None:
    """As `dequantize`, written into `out`: contiguous, of shape `q.shape`, any floating dtype."""
    assert tuple(out.shape) == q.shape, (tuple(out.shape), q.shape)
    scale, zero_points = block_scales(q), q.scale_parts().zero_points
    packed, flat = q.packed.view(-1), out.view(-1)
    lookup = _NibbleLookup(q.spec.format, packed) if q.spec.bits == 4 else _PlaneLookup(q.spec, packed)

    for start, stop, width in _panels(q.numel, q.spec.block_size):
        source = packed[q.spec.packed_bytes(start) : q.spec.packed_bytes(stop)]
        values = lookup(source, (stop - start) // width, width)  # (blocks, width)
        blocks = slice(start // q.spec.block_size, start // q.spec.block_size + len(values))
        if zero_points is not None:
            values.sub_(zero_points[blocks, None])
        values.mul_(scale[blocks, None])
        flat[start:stop].copy_(values.view(-1))


def block_scales(q: QuantizedTensor) -> Tensor:
    """The fp32 scale of each block, `[B]`, decoded where it is double-quantised."""
    parts = q.scale_parts()
    if parts.absmax is not None:
        return parts.absmax
    assert parts.codes is not None and parts.absmax2 is not None and parts.offset is not None
    return dequantize_scales(parts.codes, parts.absmax2, parts.offset)


def _panels(numel: int, block_size: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, width of a block): panels of whole blocks, then the last block where it is not full."""
    whole = numel - numel % block_size
    for start in range(0, whole, PANEL):
        yield start, min(start + PANEL, whole), block_size
    if whole < numel:
        yield whole, numel, numel - whole


def _nearest_levels(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """x (blocks, width) -> indices uint8 (blocks, width), scale (blocks,)."""
    scale = x.abs().amax(dim=1)
    if x.shape[1] == spec.block_size:
        scaled = x * (1.0 / scale.clamp(min=MIN_SCALE))[:, None]
    else:
        scale = scale.clamp(min=MIN_SCALE)
        scaled = x / scale[:, None]
    return codebooks.nearest_indices(scaled, spec.format), scale


def _nearest_levels_signed(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """As `_nearest_levels`, for scales that carry a sign."""
    magnitude = x.abs().amax(dim=1)
    sign = torch.where(x.amax(dim=1) == magnitude, 1.0, -1.0)
    scaled = x * (1.0 / (sign * magnitude.clamp(min=MIN_SCALE)))[:, None]
    return codebooks.nearest_indices(scaled, spec.format), sign * magnitude


def _affine_levels(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (blocks, width) -> indices uint8 (blocks, width), scale (blocks,), zero points uint8 (blocks,)."""
    low, high = x.amin(dim=1).clamp(max=0), x.amax(dim=1).clamp(min=0)
    scale = (high - low) / 15
    reciprocal = 1.0 / scale.clamp(min=MIN_SCALE)
    zero_point = (-low * reciprocal).round().clamp(0, 15)
    index = (x * reciprocal[:, None]).round().add_(zero_point[:, None]).clamp_(0, 15)
    return index.to(torch.uint8), scale, zero_point.to(torch.uint8)


def pack_indices(indices: Tensor, spec: QuantSpec, zero_points: Tensor | None = None) -> Tensor:
    """The bytes that a matrix, or a run of its blocks, is stored as: uint8 `[spec.packed_bytes(n)]`.

    Args:
        indices: uint8 `[n]`, from the beginning of a block.
        zero_points: of a format that has them; the last one fills up an odd count.
    """
    if spec.bits == 4:
        if len(indices) % 2:
            zero = spec.entry.zero_index if zero_points is None else int(zero_points[-1])
            indices = F.pad(indices, (0, 1), value=zero)
        return (indices[::2] << 4) | indices[1::2]
    whole = len(indices) - len(indices) % spec.block_size
    parts = [indices[:whole].view(-1, spec.block_size), indices[whole:].view(1, -1)]
    return torch.cat([_pack_planes(part, spec.bits) for part in parts if part.numel()])


def _pack_planes(indices: Tensor, bits: int) -> Tensor:
    """Blocks of nf3 or nf2, `(blocks, width)` -> their bytes."""
    planes = [_pack_plane(indices & 3, 2)]
    if bits == 3:
        planes.append(_pack_plane(indices >> 2, 1))
    return torch.cat(planes, dim=1).view(-1)


def _pack_plane(fields: Tensor, bits: int) -> Tensor:
    """Fields of 1 or 2 bits `(blocks, width)` -> bytes `(blocks, ceil(width * bits / 8))`, the first in the lowest."""
    per_byte = 8 // bits
    padded = F.pad(fields, (0, -fields.shape[1] % per_byte)).view(len(fields), -1, per_byte)
    return (padded.int() << _shifts(bits, fields.device)).sum(dim=2).to(torch.uint8)


def _unpack_plane(source: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of `_pack_plane`, int32 `(blocks, width)`."""
    fields = (source[:, :, None].int() >> _shifts(bits, source.device)) & ((1 << bits) - 1)
    return fields.view(len(source), -1)[:, :width]


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.int32, device=device)


class _NibbleLookup:
    """Bytes of four-bit indices -> fp32 values, two at a time.

    Scratch is allocated once: fresh pages for every panel would cost more than the arithmetic.
    """

    def __init__(self, format: str, packed: Tensor):
        panel_bytes = min(PANEL // 2, len(packed))
        self.pairs = _pairs(format, packed.device)
        self.index_scratch = torch.empty(panel_bytes, dtype=torch.int32, device=packed.device)
        self.pair_scratch = torch.empty(panel_bytes, dtype=torch.int64, device=packed.device)

    def __call__(self, source: Tensor, blocks: int, width: int) -> Tensor:
        """The bytes of some blocks -> (blocks, width); overwritten by the next call."""
        index = self.index_scratch[: len(source)].copy_(source)
        pair = torch.index_select(self.pairs, 0, index, out=self.pair_scratch[: len(source)])
        return pair.view(torch.float32)[: blocks * width].view(blocks, width)


class _PlaneLookup:
    """Bytes of nf3's or nf2's planes -> fp32 values."""

    def __init__(self, spec: QuantSpec, packed: Tensor):
        self.bits, self.table = spec.bits, codebooks.codebook(spec.format, packed.device)

    def __call__(self, source: Tensor, blocks: int, width: int) -> Tensor:
        """The bytes of some blocks -> (blocks, width)."""
        planes, low_bytes = source.view(blocks, -1), -(-width // 4)
        index = _unpack_plane(planes[:, :low_bytes], 2, width)
        if self.bits == 3:
            index = index | _unpack_plane(planes[:, low_bytes:], 1, width) << 2
        return torch.index_select(self.table, 0, index.reshape(-1)).view(blocks, width)


@functools.cache
def _pairs(format: str, device: torch.device) -> Tensor:
    """Both fp32 values of every byte, as one 8-byte element: [256]. A lookup then moves two values at once."""
    values, byte = codebooks.codebook(format), torch.arange(256, device=codebooks.CPU)
    pairs = torch.stack([values[byte >> 4], values[byte & 15]], dim=1)  # (256, 2)
    return pairs.view(torch.int64).view(256).to(device)


def not_finite(flat: Tensor) -> FormatError:
    """The error for a weight with values that are not finite, which it counts."""
    bad = flat.numel() - int(torch.isfinite(flat).sum())
    got = f"{bad} of {flat.numel()} values are not finite." if bad else "The spread of a block's values overflows fp32."
    return FormatError(got, "Weights must be finite.", "Check the source model; it may be damaged.")
