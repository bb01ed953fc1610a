"""bitsandbytes' eight bits (LLM.int8, Dettmers et al. 2022, arXiv 2208.07339): integers and the largest value a row.

    weight        int8 [out, in]
    SCB           fp32 [out]       largest magnitude of each row
    weight_format uint8 []         0: rows lie one after another; older files have layouts of GPUs

`weight[o, i] = code[o, i] * SCB[o] / 127`.
"""

from collections.abc import Mapping

from torch import Tensor

from nybble.errors import FormatError
from nybble.formats.packed_layout import PackedLayout, Part, Shapes, check_matrix, check_shape

ONE_STEP = 7.874015718698502e-3  # 1 / 127 as bitsandbytes has it, rounded to fp32
ROWS = 0  # of weight_format


def layout() -> PackedLayout:
    parts = {".weight": Part(("I8",)), ".SCB": Part(("F32",)), ".weight_format": Part(("U8",), needed=False)}
    return PackedLayout("bitsandbytes, 8 bits", ".weight", parts, _shape, _widened)


def dequantize(codes: Tensor, row_maxima: Tensor) -> Tensor:
    """The weight, fp32 `[out, in]`, as bitsandbytes computes it."""
    return codes.float().mul_(row_maxima.reshape(-1, 1)).mul_(ONE_STEP)


def _shape(shapes: Shapes) -> tuple[int, ...]:
    rows, columns = check_matrix(".weight", shapes[".weight"])
    check_shape(".SCB", shapes[".SCB"], (rows,))
    check_shape(".weight_format", shapes.get(".weight_format", ()), (), (1,))
    return rows, columns


def _widened(parts: Mapping[str, Tensor]) -> Tensor:
    if ".weight_format" in parts and (order := int(parts[".weight_format"])) != ROWS:
        raise FormatError(
            f".weight_format is {order}: the codes lie in the order of a GPU's kernel.",
            f"Readable: {ROWS}, rows one after another.",
            "Save the model again with a newer bitsandbytes.",
        )
    return dequantize(parts[".weight"], parts[".SCB"])
