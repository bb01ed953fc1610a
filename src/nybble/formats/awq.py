"""AWQ's tensors (Lin et al. 2023, arXiv 2306.00978), as AutoAWQ writes them for its "gemm" kernels.

    qweight int32 [in, out / 8]         four bits, along the outputs
    qzeros  int32 [groups, out / 8]     zero points, in the same order
    scales  fp16  [groups, out]

Within a word the outputs lie in the order 0 2 4 6 1 3 5 7, from the lowest bits on.
`weight[o, i] = (code[i, o] - zero_point[g, o]) * scales[g, o]` with g = i // group_size.
"""

from collections.abc import Mapping

from torch import Tensor

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

BITS = 4
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word each of eight outputs lies


def layout(group_size: int) -> PackedLayout:
    """AWQ in four bits; -1 is one group a row."""

    def shape(shapes: Shapes) -> tuple[int, ...]:
        columns, words = check_matrix(".qweight", shapes[".qweight"])
        rows, groups = words * 32 // BITS, group_count(columns, group_size)
        check_shape(".scales", shapes[".scales"], (groups, rows))
        check_shape(".qzeros", shapes[".qzeros"], (groups, words))
        return rows, columns

    return PackedLayout(
        "AWQ, 4 bits",
        ".qweight",
        {".qweight": Part(("I32",)), ".qzeros": Part(("I32",)), ".scales": Part(FLOATS)},
        shape,
        _widened,
    )


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """The weight, fp32 `[out, in]`; arguments as above."""
    return scale_groups(_unpack(qweight).T.contiguous(), scales.T, _unpack(qzeros).T)


def _widened(parts: Mapping[str, Tensor]) -> Tensor:
    return dequantize(parts[".qweight"], parts[".qzeros"], parts[".scales"])


def _unpack(words: Tensor) -> Tensor:
    """int32 (n, out / 8) -> codes (n, out)"""
    return unpack_words(words, BITS).unflatten(-1, (-1, len(PLACES)))[..., PLACES].flatten(-2)
