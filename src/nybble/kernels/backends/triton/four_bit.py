"""jit/four_bit.py."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from nybble.formats.blockwise import not_finite
from nybble.formats.codebooks import codebook, dynamic_map, midpoints, sorted_order
from nybble.formats.double_quant import scale_parts
from nybble.formats.format import FORMATS, STORED_FORMATS
from nybble.formats.quant_spec import QuantSpec
from nybble.formats.quantized_tensor import join_scales
from nybble.kernels import registry
from nybble.kernels.backends.triton.launch import THREADS, WARPS, launch, launch_tiles, power_of_two, too_many
from nybble.kernels.ops.four_bit import allocating, write_beside

MAX_GEMV_ROWS = 8  # a thread holds a sum for each


@registry.register("quantize_4bit", "triton", lambda weight, *others: too_many(weight.numel()))
def quantize_4bit(weight: Tensor, format: str, block_size: int, double_quant: bool) -> tuple[Tensor, Tensor]:
    from nybble.kernels.backends.triton.jit.four_bit import quantize_kernel

    spec, numel = QuantSpec(format, block_size, double_quant), weight.numel()
    packed = weight.new_empty(spec.packed_shape(tuple(weight.shape)), dtype=torch.uint8)
    absmax = weight.new_empty(spec.num_blocks(numel), dtype=torch.float32)
    zero_points = torch.empty_like(absmax, dtype=torch.uint8) if spec.entry.zero_points else None
    launch_tiles(
        quantize_kernel, len(absmax), block_size,
        weight, midpoints(format, weight.device), sorted_order(format, weight.device),
        packed, absmax, packed if zero_points is None else zero_points, numel,
        whole_rows=True, BITS=spec.bits, SIGNED=spec.entry.signed, ZERO_POINTS=spec.entry.zero_points,
    )  # fmt: skip
    if not torch.isfinite(absmax).all():
        raise not_finite(weight)
    return packed, join_scales(scale_parts(absmax, double_quant, zero_points))


def _too_large(packed: Tensor, scales: Tensor, shape: Sequence[int], *others: Any) -> str | None:
    return too_many(prod(shape)) or _stored_only(packed, scales, shape, *others)


def _stored_only(packed: Tensor, scales: Tensor, shape: Sequence[int], format: str, *others: Any) -> str | None:
    return f"has no {format}" if format in STORED_FORMATS else None


@registry.register("dequantize_4bit_out", "triton", _too_large)
def dequantize_4bit_out(
    packed: Tensor,
    scales: Tensor,
    shape: Sequence[int],
    format: str,
    block_size: int,
    double_quant: bool,
    out: Tensor,
    gap: int = 0,
) -> None:
    """With `gap`, so many elements lie between the rows that out begins with."""
    from nybble.kernels.backends.triton.jit.four_bit import dequantize_kernel

    entry, numel, columns = FORMATS[format], prod(shape), shape[-1]
    per_word = _per_word(packed, entry.bits)
    launch(
        dequantize_kernel, -(-numel // (THREADS * per_word)),
        packed, scales, codebook(format, packed.device), dynamic_map(packed.device), out, numel, columns, gap,
        BITS=entry.bits, ZERO_POINTS=entry.zero_points, DOUBLE_QUANT=double_quant,
        BLOCK_SIZE=block_size, PER_WORD=per_word, WORDS=THREADS,
        GAPS=None if not gap else "elements" if columns % per_word else "words",
    )  # fmt: skip


@registry.register(
    "augmented_weight_", "triton", lambda *arguments: too_many(_spanned(arguments[-1])) or _stored_only(*arguments)
)
def augmented_weight_(
    packed: Tensor,
    scales: Tensor,
    shape: Sequence[int],
    format: str,
    block_size: int,
    double_quant: bool,
    b: Tensor | None,
    scaling: float,
    first: int,
    out: Tensor,
) -> None:
    columns = shape[1]
    dequantize_4bit_out(packed, scales, shape, format, block_size, double_quant, out, out.stride(0) - columns)
    write_beside(out[:, columns:], b, scaling, first)


def _spanned(rows: Tensor) -> int:
    return rows.shape[0] * rows.stride(0)


dequantize_4bit = registry.register("dequantize_4bit", "triton", _too_large)(allocating(dequantize_4bit_out))


@registry.register("gemv_4bit", "triton", lambda x, *weight: _too_large(*weight))
def gemv_4bit(
    x: Tensor, packed: Tensor, scales: Tensor, shape: Sequence[int], format: str, block_size: int, double_quant: bool
) -> Tensor:
    from nybble.kernels.backends.triton.jit.four_bit import gemv_kernel

    entry, rows, (out_features, in_features) = FORMATS[format], len(x), shape
    per_word = _per_word(packed, entry.bits)
    if rows > MAX_GEMV_ROWS or in_features % per_word:
        return x @ dequantize_4bit(packed, scales, shape, format, block_size, double_quant, x.dtype).T
    y, words = x.new_empty(rows, out_features), min(power_of_two(in_features // per_word), THREADS // WARPS)
    launch(
        gemv_kernel, -(-out_features * words // THREADS),
        x, packed, scales, codebook(format, x.device), dynamic_map(x.device), y, rows, out_features, in_features,
        BITS=entry.bits, ZERO_POINTS=entry.zero_points, DOUBLE_QUANT=double_quant, BLOCK_SIZE=block_size,
        PER_WORD=per_word, ROWS=power_of_two(rows), OUTPUTS=THREADS // words, WORDS=words,
    )  # fmt: skip
    return y


def _per_word(packed: Tensor, bits: int) -> int:
    """Elements of the word that a thread reads: 8 or, where it must be narrower, 4 or 2."""
    field_bits = 4 if bits == 4 else 2
    return 8 * _word_bytes(packed, most=field_bits) // field_bits  # 8 fields are as many bytes as a field has bits


def _word_bytes(packed: Tensor, most: int) -> int:
    """The widest word, in bytes, that `packed` is aligned for and full of: views into a block's bytes are not always
    aligned for four.
    """
    return next(size for size in (4, 2, 1) if size <= most and (packed.data_ptr() | packed.numel()) % size == 0)
