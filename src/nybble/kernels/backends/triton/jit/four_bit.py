"""Weights in four, three and two bits; `packed` and `scales` are laid out as nybble.formats.quantized_tensor says.

A thread reads a word of `packed`: eight elements, whose 16-bit values are one store. All arithmetic is fp32, with one
rounding at the end, so that the bits are the reference's. All tables are read from memory: they stay in the L1 cache.
"""

import triton
import triton.language as tl

from nybble.kernels.backends.triton.jit.language import MIN_SCALE, bucket, rounded, tile, widened

LARGEST = tl.constexpr(3.4028234663852886e38)  # finite number in fp32
NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2 ** 23: added and taken away, it rounds to a whole number, half to even


@triton.jit
def dequantize_kernel(
    packed, scales, levels, dynamic_map, out, numel, columns, gap,
    BITS: tl.constexpr, ZERO_POINTS: tl.constexpr, DOUBLE_QUANT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PER_WORD: tl.constexpr, WORDS: tl.constexpr, GAPS: tl.constexpr,
):  # fmt: skip
    """out (numel) of any floating type; `levels` fp32 [2 ** BITS], `dynamic_map` fp32 [256].

    Args:
        PER_WORD: elements, 8 or, where words are narrower, 4 or 2. `packed` is whole aligned words.
        WORDS: of a program.
        GAPS: None, or what `gap` elements lie between of out's rows of `columns`: "words" or, where words straddle
            rows, "elements".
    """
    first = (tl.program_id(0) * WORDS + tl.arange(0, WORDS)) * PER_WORD  # (W), a word's first element
    inside = first < numel
    lane = tl.arange(0, PER_WORD)  # (P)
    scale = block_scale(scales, dynamic_map, first, inside, numel, DOUBLE_QUANT, BLOCK_SIZE)
    value = tl.load(levels + indices(packed, first, inside, lane, numel, BITS, BLOCK_SIZE, PER_WORD))  # (W, P)
    if ZERO_POINTS:
        value -= zero_point(scales, first, inside, numel, DOUBLE_QUANT, BLOCK_SIZE)[:, None]
    at = first[:, None] + lane[None, :]
    inside = at < numel
    if GAPS == "words":
        at += (first // columns * gap)[:, None]
    if GAPS == "elements":
        at += at // columns * gap
    tl.store(out + at, rounded(value * scale[:, None], out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def quantize_kernel(
    weight, midpoints, order, packed, absmax, zero_points, numel, rows, width,
    BITS: tl.constexpr, SIGNED: tl.constexpr, ZERO_POINTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Blocks (rows, width) of `weight` -> packed, absmax fp32 (rows) and, in formats that have them, zero_points;
    absmax is not finite where a value is not, or the spread of a block's values.
    """
    block, column, begun = tile(rows, width, ROWS, COLUMNS)
    left = numel - block * COLUMNS  # (R, 1), elements of a block
    x = widened(tl.load(weight + block * COLUMNS + column, mask=begun & (column < left), other=0.0))
    finite, least = tl.abs(x) <= LARGEST, tl.cast(MIN_SCALE, tl.float32)
    magnitude = tl.max(tl.where(finite, tl.abs(x), float("inf")), 1, keep_dims=True)
    x = tl.where(finite, x, 0.0)
    if ZERO_POINTS:
        low, high = tl.minimum(tl.min(x, 1, keep_dims=True), 0.0), tl.maximum(tl.max(x, 1, keep_dims=True), 0.0)
        scale = tl.div_rn(high - low, 15.0)
        reciprocal = tl.div_rn(1.0, tl.maximum(scale, least))
        zero = tl.clamp(-low * reciprocal + NEAREST - NEAREST, 0.0, 15.0)
        index = tl.clamp((x * reciprocal + NEAREST - NEAREST) + zero, 0.0, 15.0).to(tl.int32)
        scale = tl.where(magnitude <= LARGEST, scale, magnitude)
        tl.store(zero_points + block, zero.to(tl.uint8), mask=block < rows)
    else:
        scale = magnitude
        if SIGNED:
            scale = tl.where(tl.max(x, 1, keep_dims=True) == magnitude, magnitude, -magnitude)
            divisor = tl.where(scale < 0, tl.minimum(scale, -least), tl.maximum(scale, least))
            scaled = x * tl.div_rn(1.0, divisor)
        else:  # bitsandbytes' exception
            divisor, whole = tl.maximum(scale, least), left >= COLUMNS
            scaled = tl.where(whole, x * tl.div_rn(1.0, divisor), tl.div_rn(x, divisor))
            scale = tl.where(whole, scale, divisor)
        index = tl.load(order + bucket(scaled, midpoints, BITS)).to(tl.int32)
    tl.store(absmax + block, scale, mask=block < rows)
    if BITS == 4:  # beyond the last element x is 0, and its index fills up the last byte
        _store_fields(packed + block * (COLUMNS // 2), index, left, 4, ROWS, COLUMNS)
    else:
        index = tl.where(column < left, index, 0)
        packed += block * (COLUMNS * BITS // 8)
        _store_fields(packed, index & 3, left, 2, ROWS, COLUMNS)
        if BITS == 3:
            low_bytes = (tl.minimum(left, COLUMNS) + 3) // 4
            _store_fields(packed + low_bytes, index >> 2, left, 1, ROWS, COLUMNS)


@triton.jit
def _store_fields(target, fields, left, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Fields (R, C) side by side in the bytes of their block, which `target` (R, 1) begins and `left` elements are in;
    the first in the lowest bits, but of two halves of a byte in the high one.
    """
    PER_BYTE: tl.constexpr = 8 // BITS
    lane = tl.arange(0, PER_BYTE)
    if BITS == 4:
        lane = lane ^ 1
    split = tl.reshape(fields, (ROWS, COLUMNS // PER_BYTE, PER_BYTE))
    byte = tl.sum(split << (BITS * lane)[None, None, :], 2)
    at = tl.arange(0, COLUMNS // PER_BYTE)[None, :]
    tl.store(target + at, byte.to(tl.uint8), mask=at * PER_BYTE < left)


@triton.jit(do_not_specialize=["rows", "out_features"])
def gemv_kernel(
    x, packed, scales, levels, dynamic_map, y, rows, out_features, in_features,
    BITS: tl.constexpr, ZERO_POINTS: tl.constexpr, DOUBLE_QUANT: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PER_WORD: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """y (rows, out_features) = x (rows, in_features) times the weight; in_features a multiple of PER_WORD, so that no
    word is in two rows. A thread goes along a row and adds up what its words make, for all rows of x.

    Args:
        ROWS: of x, and perhaps more.
        OUTPUTS: of a program, each from WORDS threads.
    """
    word, lane = tl.arange(0, OUTPUTS * WORDS), tl.arange(0, PER_WORD)
    output = tl.program_id(0) * OUTPUTS + word // WORDS  # (W)
    row, numel = tl.arange(0, ROWS), out_features * in_features
    total = tl.zeros((OUTPUTS * WORDS, ROWS), tl.float32)
    for begin in range(0, in_features, WORDS * PER_WORD):
        column = begin + word % WORDS * PER_WORD
        first, inside = output * in_features + column, (output < out_features) & (column < in_features)
        scale = block_scale(scales, dynamic_map, first, inside, numel, DOUBLE_QUANT, BLOCK_SIZE)
        value = tl.load(levels + indices(packed, first, inside, lane, numel, BITS, BLOCK_SIZE, PER_WORD))  # (W, P)
        if ZERO_POINTS:
            value -= zero_point(scales, first, inside, numel, DOUBLE_QUANT, BLOCK_SIZE)[:, None]
        value *= scale[:, None]
        for r in tl.static_range(ROWS):
            at = r * in_features + column[:, None] + lane[None, :]
            taken = tl.load(x + at, mask=inside[:, None] & (r < rows), other=0.0).to(tl.float32)
            total += tl.where((row == r)[None, :], tl.sum(taken * value, 1)[:, None], 0.0)
    product = tl.sum(tl.reshape(total, (OUTPUTS, WORDS, ROWS)), 1)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    at, there = row[None, :] * out_features + output[:, None], (row < rows)[None, :] & (output < out_features)[:, None]
    tl.store(y + at, rounded(product, y.dtype.element_ty), mask=there)


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
