"""compressed-tensors' integers: packed into int32 words ("pack-quantized"), or int8 ("int-quantized").

    weight_packed     int32 [out, in * bits / 32]    code + 2 ** (bits - 1), from the lowest bit on
    weight            int8  [out, in]                instead, where they are not packed
    weight_scale      [out, groups], [out, 1] or []
    weight_zero_point int32 [out * bits / 32, groups] packed along the outputs as the codes are; or int8 as the scales
    weight_shape      int64 [2]
    weight_g_idx      int32 [in]                     the group of each input, where they were ordered by activation

`weight = (code - zero_point) * scale`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nybble.errors import FormatError
from nybble.formats.packed_layout import (
    FLOATS,
    PackedLayout,
    Part,
    Shapes,
    check_matrix,
    check_shape,
    group_count,
    scale_groups,
    unpack_words,
)

PACKED_BITS = (2, 4, 8)  # others are packed in two ways that nothing tells apart
ACTIVATIONS = (".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point")


def layout(bits: int, strategy: str, group_size: int, symmetric: bool, packed: bool) -> PackedLayout:
    """compressed-tensors' integers of so many bits.

    Args:
        strategy: who shares a scale: "tensor" all, "channel" a row, "group" so many inputs of one as group_size says.
        packed: into words; else int8.
    """
    codes = ".weight_packed" if packed else ".weight"
    packed_zeros = packed and strategy != "tensor"

    def shape(shapes: Shapes) -> tuple[int, ...]:
        rows, columns = check_matrix(codes, shapes[codes])
        columns = columns * 32 // bits if packed else columns
        groups = group_count(columns, group_size) if strategy == "group" else 1
        scales = [(), (1,), (1, 1)] if strategy == "tensor" else [(rows, groups)]
        check_shape(".weight_scale", shapes[".weight_scale"], *scales)
        if not symmetric:
            zeros = [(-(-rows * bits // 32), groups)] if packed_zeros else scales
            check_shape(".weight_zero_point", shapes[".weight_zero_point"], *zeros)
        if ".weight_g_idx" in shapes:
            check_shape(".weight_g_idx", shapes[".weight_g_idx"], (columns,))
        return rows, columns

    def widened(parts: Mapping[str, Tensor]) -> Tensor:
        integers = _unpack(parts[codes], bits) if packed else parts[codes]
        _check_written_shape(parts, tuple(integers.shape))
        scales = parts[".weight_scale"]
        scales = scales if strategy != "tensor" else scales.reshape(1, 1)
        zero_points = None if symmetric else parts[".weight_zero_point"]
        if zero_points is not None:
            zero_points = _unpack(zero_points.T, bits).T[: len(integers)] if packed_zeros else zero_points
            zero_points = zero_points.reshape(scales.shape)
        return scale_groups(integers, scales, zero_points, _groups(parts, scales.shape[1]))

    parts = {codes: Part(("I32",) if packed else ("I8",)), ".weight_scale": Part(FLOATS)}
    if packed:
        parts |= {".weight_shape": Part(("I64", "I32"), needed=False)}
        parts |= {".weight_g_idx": Part(("I32", "I64"), needed=False)}
    if not symmetric:
        parts |= {".weight_zero_point": Part(("I32",) if packed_zeros else ("I8",))}
    return PackedLayout(
        f"compressed-tensors, integers of {bits} bits", codes, parts, shape, widened, unused=ACTIVATIONS
    )


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Codes about zero, int16."""
    return unpack_words(words, bits).to(torch.int16) - (1 << (bits - 1))


def _check_written_shape(parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    if ".weight_shape" in parts and tuple(parts[".weight_shape"].tolist()) != shape:
        raise FormatError(
            f".weight_shape says {parts['.weight_shape'].tolist()}, the codes are {list(shape)}.",
            "Readable: rows that fill their words.",
            "The checkpoint is damaged, or its config belongs to another.",
        )


def _groups(parts: Mapping[str, Tensor], num_groups: int) -> Tensor | None:
    if ".weight_g_idx" not in parts or int((group := parts[".weight_g_idx"].long()).max()) == -1:
        return None  # compressed-tensors writes -1 where it was not ordered
    if not 0 <= int(group.min()) <= int(group.max()) < num_groups:
        raise FormatError(
            f".weight_g_idx holds groups {int(group.min())} to {int(group.max())} of {num_groups}.",
            fix="The checkpoint is damaged.",
        )
    return group
