"""GPTQ's tensors (Frantar et al. 2022, arXiv 2210.17323), as AutoGPTQ and GPTQModel write them.

    qweight int32 [in * bits / 32, out]          codes of a column one after another, from the lowest bit on
    qzeros  int32 [groups, out * bits / 32]      zero points, packed along the outputs
    scales  fp16  [groups, out]
    g_idx   int32 [in]                           the group of each input; ordered by activation it is any

`weight[o, i] = (code[i, o] - zero_point[g_idx[i], o]) * scales[g_idx[i], o]`. Checkpoints of format v1 ("gptq") store
zero points less one, modulo 2 ** bits; "gptq_v2" as they are.
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

BITS = (2, 3, 4, 8)


def layout(bits: int, group_size: int, ordered: bool, first_version: bool) -> PackedLayout:
    """GPTQ of so many bits.

    Args:
        group_size: -1 for one group a row.
        ordered: by activation: g_idx is needed.
        first_version: of the checkpoint's format, which stores zero points less one.
    """

    def shape(shapes: Shapes) -> tuple[int, ...]:
        words, rows = check_matrix(".qweight", shapes[".qweight"])
        columns = words * 32 // bits
        groups = group_count(columns, group_size)
        check_shape(".scales", shapes[".scales"], (groups, rows))
        check_shape(".qzeros", shapes[".qzeros"], (groups, rows * bits // 32))
        if ".g_idx" in shapes:
            check_shape(".g_idx", shapes[".g_idx"], (columns,))
        return rows, columns

    def widened(parts: Mapping[str, Tensor]) -> Tensor:
        tensors = (parts[".qweight"], parts[".qzeros"], parts[".scales"], parts.get(".g_idx"))
        return dequantize(*tensors, bits=bits, first_version=first_version)

    return PackedLayout(
        f"GPTQ, {bits} bits",
        ".qweight",
        {
            ".qweight": Part(("I32",)),
            ".qzeros": Part(("I32",)),
            ".scales": Part(FLOATS),
            ".g_idx": Part(("I32",), needed=ordered),
        },
        shape,
        widened,
    )


def dequantize(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, *, bits: int, first_version: bool
) -> Tensor:
    """The weight, fp32 `[out, in]`; arguments as above, g_idx None where groups are of neighbours.

    Raises:
        FormatError: g_idx names a group that there is not.
    """
    zero_points = unpack_words(qzeros, bits)  # (groups, out)
    if first_version:
        zero_points = (zero_points + 1) & ((1 << bits) - 1)
    group = None if g_idx is None else g_idx.long()
    if group is not None and not 0 <= int(group.min()) <= int(group.max()) < len(scales):
        raise FormatError(
            f".g_idx holds groups {int(group.min())} to {int(group.max())} of {len(scales)}.",
            fix="The checkpoint is damaged.",
        )
    if group is not None and torch.equal(group, torch.arange(len(group)) // (len(group) // len(scales))):
        group = None  # neighbours: no table is needed
    return scale_groups(unpack_words(qweight.T, bits), scales.T, zero_points.T, group)
