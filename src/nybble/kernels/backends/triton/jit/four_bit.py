"""Weights in four, three and two bits; `packed` and `scales` are laid out as nybble.formats.quantized_tensor says.

A thread takes a word of `packed`: eight elements, whose 16-bit values are one store. All arithmetic is fp32, with one
rounding at the end, so that the bits are the reference's. Both tables are read from memory: they stay in the L1 cache.
"""

import triton
import triton.language as tl

from nybble.kernels.backends.triton.jit.language import rounded


@triton.jit
def dequantize_kernel(
    packed, scales, levels, dynamic_map, out, numel,
    BITS: tl.constexpr, ZERO_POINTS: tl.constexpr, DOUBLE_QUANT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PER_WORD: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """out (numel) of any floating type; `levels` fp32 [2 ** BITS], `dynamic_map` fp32 [256].

    Args:
        PER_WORD: elements, 8 or, where words are narrower, 4 or 2. `packed` is whole aligned words.
        WORDS: of a program.
    """
    first = (tl.program_id(0) * WORDS + tl.arange(0, WORDS)) * PER_WORD  # (W), a word's first element
    inside = first < numel
    lane = tl.arange(0, PER_WORD)  # (P)
    scale = block_scale(scales, dynamic_map, first, inside, numel, DOUBLE_QUANT, BLOCK_SIZE)
    value = tl.load(levels + indices(packed, first, inside, lane, numel, BITS, BLOCK_SIZE, PER_WORD))  # (W, P)
    if ZERO_POINTS:
        value -= zero_point(scales, first, inside, numel, DOUBLE_QUANT, BLOCK_SIZE)[:, None]
    at = first[:, None] + lane[None, :]
    tl.store(out + at, rounded(value * scale[:, None], out.dtype.element_ty), mask=at < numel)


@triton.jit
def indices(packed, first, inside, lane, numel, BITS: tl.constexpr, BLOCK_SIZE: tl.constexpr, PER_WORD: tl.constexpr):
    """The indices of words' elements, int32 (W, P)."""
    if BITS == 4:
        word = _words(packed, PER_WORD // 2, first // PER_WORD, inside)
        return (word[:, None] >> (4 * (lane ^ 1))[None, :]) & 15  # the even one is the high nibble
    if BITS == 2:
        word = _words(packed, PER_WORD // 4, first // PER_WORD, inside)
        return (word[:, None] >> (2 * lane)[None, :]) & 3
    # A plane of low two bits, then one of third bits, in each block.
    begin, within = first // BLOCK_SIZE * BLOCK_SIZE, first % BLOCK_SIZE
    plane = packed + begin // 8 * 3
    low = _words(plane, PER_WORD // 4, within // PER_WORD, inside)
    low_bytes = (tl.minimum(numel - begin, BLOCK_SIZE) + 3) // 4
    high = tl.load(plane + low_bytes + within // 8, mask=inside, other=0).to(tl.int32) >> (within % 8)
    return ((low[:, None] >> (2 * lane)[None, :]) & 3) | (((high[:, None] >> lane[None, :]) & 1) << 2)


@triton.jit
def _words(source, WORD_BYTES: tl.constexpr, index, inside):
    """Words of 4, 2 or 1 bytes, int32 (W)."""
    if WORD_BYTES == 4:
        source = source.to(tl.pointer_type(tl.int32))
    if WORD_BYTES == 2:
        source = source.to(tl.pointer_type(tl.int16))
    return tl.load(source + index, mask=inside, other=0).to(tl.int32)


@triton.jit
def block_scale(
    scales, dynamic_map, element, inside, numel, DOUBLE_QUANT: tl.constexpr, BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    """The scale of the block that each element is in, fp32; `scales` holds all parts, as bytes."""
    block, fields = element // BLOCK_SIZE, scales.to(tl.pointer_type(tl.float32))
    if not DOUBLE_QUANT:
        return tl.load(fields + block, mask=inside, other=0.0)
    code = tl.load(scales + _codes_at(numel, BLOCK_SIZE) + block, mask=inside, other=0).to(tl.int32)
    absmax2 = tl.load(fields + 1 + block // 256, mask=inside, other=0.0)
    return tl.load(dynamic_map + code) * absmax2 + tl.load(fields)


@triton.jit
def zero_point(scales, element, inside, numel, DOUBLE_QUANT: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The zero point of the block that each element is in, fp32."""
    blocks = tl.cdiv(numel, BLOCK_SIZE)
    at = _codes_at(numel, BLOCK_SIZE) + blocks if DOUBLE_QUANT else 4 * blocks
    return tl.load(scales + at + element // BLOCK_SIZE, mask=inside, other=0).to(tl.float32)


@triton.jit
def _codes_at(numel, BLOCK_SIZE: tl.constexpr):
    """Bytes before the codes of double quantisation: an offset, and a scale for each 256 blocks."""
    return 4 + 4 * tl.cdiv(tl.cdiv(numel, BLOCK_SIZE), 256)
