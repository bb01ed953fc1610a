"""MXFP4: values of four bits that share a power of two, 32 by 32 (OCP Microscaling Formats 1.0, section 5.3).

An element is E2M1: sign, two exponent bits, one mantissa bit. A byte holds two, the first in the low nibble. A block's
scale is E8M0: a byte s that stands for 2 ** (s - 127), and 255 for no number. gpt-oss keeps its experts so
(`*_blocks` and `*_scales`), compressed-tensors its linear layers (`weight_packed` and `weight_scale`).
"""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from nybble.errors import FormatError
from nybble.formats.packed_layout import (
    PackedLayout,
    Part,
    Shapes,
    check_matrix,
    check_shape,
    group_count,
    refuse_shape,
)

BLOCK_SIZE = 32
SCALE_BIAS = 127
NO_NUMBER = 255  # the scale of a block that holds no numbers
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # by index


def experts_layout() -> PackedLayout:
    """gpt-oss's stacks of experts, `[experts, in, out]` as transformers keeps them: stored are blocks of
    `[experts, out, in / 32, 16]`. bf16 holds their values exactly.
    """

    def shape(shapes: Shapes) -> tuple[int, ...]:
        if len(shapes["_blocks"]) != 4:
            refuse_shape("_blocks", shapes["_blocks"], "[experts, out, in / 32, 16]")
        experts, rows, groups, _ = shapes["_blocks"]
        check_shape("_blocks", shapes["_blocks"], (experts, rows, groups, BLOCK_SIZE // 2))
        check_shape("_scales", shapes["_scales"], (experts, rows, groups))
        return experts, groups * BLOCK_SIZE, rows

    def widened(parts: Mapping[str, Tensor]) -> Tensor:
        blocks, scales = parts["_blocks"], parts["_scales"]
        stack = torch.empty(len(blocks), scales.shape[2] * BLOCK_SIZE, scales.shape[1], dtype=torch.bfloat16)
        for expert, (own_blocks, own_scales) in enumerate(zip(blocks, scales, strict=True)):
            stack[expert] = dequantize(own_blocks, own_scales, torch.bfloat16).T
        return stack

    parts = {"_blocks": Part(("U8",)), "_scales": Part(("U8",))}
    return PackedLayout("MXFP4 experts", "_blocks", parts, shape, widened, weight="")


def compressed_layout() -> PackedLayout:
    """compressed-tensors' linear layers."""

    def shape(shapes: Shapes) -> tuple[int, ...]:
        rows, num_bytes = check_matrix(".weight_packed", shapes[".weight_packed"])
        check_shape(".weight_scale", shapes[".weight_scale"], (rows, group_count(2 * num_bytes, BLOCK_SIZE)))
        return rows, 2 * num_bytes

    def widened(parts: Mapping[str, Tensor]) -> Tensor:
        return dequantize(parts[".weight_packed"], parts[".weight_scale"])

    parts = {".weight_packed": Part(("U8",)), ".weight_scale": Part(("U8",))}
    return PackedLayout("MXFP4", ".weight_packed", parts, shape, widened, unused=(".input_global_scale",))


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of MXFP4 blocks: fp32 arithmetic, which is exact, and one rounding.

    A slice of both along their outer dimensions gives that slice of the values: an expert at a time, or rows.

    Args:
        blocks: uint8 `[.., columns / 32, 16]` as gpt-oss stores them, or `[.., columns / 2]`.
        scales: uint8 `[.., columns / 32]`.

    Returns:
        `[.., columns]`, rows as they are stored: of a linear layer `[out, in]`. transformers keeps gpt-oss's experts
        the other way round.

    Raises:
        FormatError: shapes that do not belong together, other dtypes, or a scale that stands for no number.
    """
    _check(blocks, scales)
    exponents = scales.to(torch.int32) - SCALE_BIAS
    values = e2m1_values(blocks).view(*scales.shape, BLOCK_SIZE)
    return torch.ldexp(values, exponents.unsqueeze(-1)).flatten(-2).to(dtype)


def e2m1_values(packed: Tensor) -> Tensor:
    """The elements of bytes that hold two each, the low nibble first: uint8 of n bytes -> fp32 `[2 * n]`."""
    return _pairs(packed.device).index_select(0, packed.reshape(-1).int()).view(-1)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """Both elements of each byte, fp32 (256, 2)."""
    levels, byte = torch.tensor(E2M1, device=device), torch.arange(256, device=device)
    return torch.stack([levels[byte & 15], levels[byte >> 4]], dim=1)


def _check(blocks: Tensor, scales: Tensor) -> None:
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise FormatError(f"MXFP4 blocks are {blocks.dtype}, their scales {scales.dtype}.", "Both are uint8.")
    num_bytes = BLOCK_SIZE // 2
    stacked, flat = (*scales.shape, num_bytes), (*scales.shape[:-1], scales.shape[-1] * num_bytes)
    if tuple(blocks.shape) not in (stacked, flat):
        raise FormatError(
            f"MXFP4 blocks have the shape {list(blocks.shape)}, their scales {list(scales.shape)}.",
            f"A scale belongs to {num_bytes} bytes, {BLOCK_SIZE} values: {list(stacked)} or {list(flat)}.",
            "The checkpoint may be damaged.",
        )
    if scales.numel() and int(scales.max()) == NO_NUMBER:
        raise FormatError(
            f"MXFP4 scales hold {NO_NUMBER}, which stands for no number.", fix="The checkpoint may be damaged."
        )
