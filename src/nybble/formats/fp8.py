"""Weights in fp8 (E4M3 or E5M2) beside their scales: one for all, one for each row, or one for each rectangle.

`weight = code * scale`. DeepSeek-V3 (arXiv 2412.19437, section 3.3) and Qwen publish `weight_scale_inv`, a scale for
each 128 x 128 rectangle, the last ones of a row or column cut off; by its name an inverse, it is multiplied with.
Per tensor and per row: compressed-tensors' and ModelOpt's `weight_scale`.
"""

from collections.abc import Mapping

from torch import Tensor

from nybble.formats.packed_layout import FLOATS, FP8, PackedLayout, Part, Shapes, check_matrix, check_shape

Block = tuple[int, int] | None


def layout(scale: str, block: Block, per_row: bool = False, aliases: Mapping[str, str] | None = None) -> PackedLayout:
    """Weights in fp8.

    Args:
        scale: end of the scales' name; aliases: others that mean it.
        block: rows and columns of a rectangle; None for one scale, or one a row.
        per_row: without rectangles, a scale for each row.
    """

    def shape(shapes: Shapes) -> tuple[int, ...]:
        rows, columns = check_matrix(".weight", shapes[".weight"])
        if block is not None:
            check_shape(scale, shapes[scale], (-(-rows // block[0]), -(-columns // block[1])))
        elif per_row:
            check_shape(scale, shapes[scale], (rows, 1), (rows,))
        else:
            check_shape(scale, shapes[scale], (), (1,), (1, 1))
        return rows, columns

    def widened(parts: Mapping[str, Tensor]) -> Tensor:
        return dequantize(parts[".weight"], parts[scale], block)

    kind = f"a scale for {block[0]} x {block[1]}" if block else "a scale a row" if per_row else "one scale"
    parts = {".weight": Part(FP8), scale: Part((*FLOATS, "F8_E8M0"))}
    activations = (".input_scale", ".activation_scale", ".input_scale_ub", ".output_scale")
    return PackedLayout(f"fp8, {kind}", ".weight", parts, shape, widened, unused=activations, aliases=aliases or {})


def dequantize(codes: Tensor, scales: Tensor, block: Block = None) -> Tensor:
    """The weight, fp32 `[out, in]`.

    Args:
        codes: fp8 `[out, in]`.
        scales: one value, one for each row, or `[ceil(out / block rows), ceil(in / block columns)]`.
    """
    values, factors = codes.float(), scales.float()
    if block is None:
        return values.mul_(factors.reshape(-1, 1))
    for first, row in zip(range(0, len(values), block[0]), factors, strict=True):
        values[first : first + block[0]] *= row.repeat_interleave(block[1])[: values.shape[1]]
    return values
