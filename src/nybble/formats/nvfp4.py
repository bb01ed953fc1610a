"""NVFP4: E2M1 values that share an fp8 scale, 16 by 16, under one fp32 scale for the tensor (NVIDIA 2025).

`weight = value * (scale of its block * scale of the tensor)`. ModelOpt stores the tensor's scale to multiply with, as
`weight_scale_2`; compressed-tensors one to divide by, as `weight_global_scale`. Two values a byte, the first in the
low nibble.
"""

from collections.abc import Mapping

from torch import Tensor

from nybble.formats.mxfp4 import e2m1_values
from nybble.formats.packed_layout import PackedLayout, Part, Shapes, Widened, check_matrix, check_shape, group_count

BLOCK_SIZE = 16


def modelopt_layout() -> PackedLayout:
    """As ModelOpt writes it."""

    def widened(parts: Mapping[str, Tensor]) -> Tensor:
        return dequantize(parts[".weight"], parts[".weight_scale"].float() * parts[".weight_scale_2"].reshape(()))

    return _layout(".weight", ".weight_scale_2", widened, (".input_scale", ".k_scale", ".v_scale"))


def compressed_layout() -> PackedLayout:
    """As compressed-tensors writes it."""

    def widened(parts: Mapping[str, Tensor]) -> Tensor:
        scales = parts[".weight_scale"].float() / parts[".weight_global_scale"].reshape(())
        return dequantize(parts[".weight_packed"], scales)

    return _layout(".weight_packed", ".weight_global_scale", widened, (".input_global_scale",))


def dequantize(packed: Tensor, scales: Tensor) -> Tensor:
    """The weight, fp32 `[out, in]`.

    Args:
        packed: uint8 `[out, in / 2]`.
        scales: of blocks and tensor together, fp32 `[out, in / 16]`.
    """
    values = e2m1_values(packed).view(*scales.shape, BLOCK_SIZE)
    return (values * scales.unsqueeze(-1)).flatten(-2)


def _layout(codes: str, tensor_scale: str, widened: Widened, unused: tuple[str, ...]) -> PackedLayout:
    def shape(shapes: Shapes) -> tuple[int, ...]:
        rows, num_bytes = check_matrix(codes, shapes[codes])
        columns = 2 * num_bytes
        check_shape(".weight_scale", shapes[".weight_scale"], (rows, group_count(columns, BLOCK_SIZE)))
        check_shape(tensor_scale, shapes[tensor_scale], (), (1,))
        return rows, columns

    parts = {codes: Part(("U8",)), ".weight_scale": Part(("F8_E4M3",)), tensor_scale: Part(("F32",))}
    return PackedLayout("NVFP4", codes, parts, shape, widened, unused=unused)
