"""jit/four_bit.py."""

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from nybble.formats.codebooks import codebook, dynamic_map
from nybble.formats.format import FORMATS
from nybble.kernels import registry
from nybble.kernels.backends.triton.launch import THREADS, launch, too_many
from nybble.kernels.ops.four_bit import allocating


def _too_large(packed: Tensor, scales: Tensor, shape: Sequence[int], *others: Any) -> str | None:
    return too_many(prod(shape))


@registry.register("dequantize_4bit_out", "triton", _too_large)
def dequantize_4bit_out(
    packed: Tensor,
    scales: Tensor,
    shape: Sequence[int],
    format: str,
    block_size: int,
    double_quant: bool,
    out: Tensor,
) -> None:
    from nybble.kernels.backends.triton.jit.four_bit import dequantize_kernel

    entry, numel = FORMATS[format], out.numel()
    field_bits = 4 if entry.bits == 4 else 2
    per_word = 8 * _word_bytes(packed, most=field_bits) // field_bits  # 8 fields are as many bytes as a field has bits
    launch(
        dequantize_kernel, -(-numel // (THREADS * per_word)),
        packed, scales, codebook(format, packed.device), dynamic_map(packed.device), out, numel,
        BITS=entry.bits, ZERO_POINTS=entry.zero_points, DOUBLE_QUANT=double_quant,
        BLOCK_SIZE=block_size, PER_WORD=per_word, WORDS=THREADS,
    )  # fmt: skip


dequantize_4bit = registry.register("dequantize_4bit", "triton", _too_large)(allocating(dequantize_4bit_out))


def _word_bytes(packed: Tensor, most: int) -> int:
    """The widest word, in bytes, that `packed` is aligned for and full of: views into a block's bytes are not always
    aligned for four.
    """
    return next(size for size in (4, 2, 1) if size <= most and (packed.data_ptr() | packed.numel()) % size == 0)
