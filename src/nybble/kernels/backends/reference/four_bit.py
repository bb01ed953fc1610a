"""nybble.formats.blockwise behind the op signatures."""

from collections.abc import Sequence

from torch import Tensor

from nybble.formats import blockwise, ggml_blocks
from nybble.formats.quant_spec import QuantSpec
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels import registry
from nybble.kernels.ops.four_bit import allocating, write_beside


@registry.register("quantize_4bit", "reference")
def quantize_4bit(weight: Tensor, format: str, block_size: int, double_quant: bool) -> tuple[Tensor, Tensor]:
    q = blockwise.quantize(weight, QuantSpec(format, block_size, double_quant))
    return q.packed, q.scales


@registry.register("dequantize_4bit_out", "reference")
def dequantize_4bit_out(
    packed: Tensor, scales: Tensor, shape: Sequence[int], format: str, block_size: int, double_quant: bool, out: Tensor
) -> None:
    sizes, spec = tuple(shape), QuantSpec(format, block_size, double_quant)
    q = QuantizedTensor(packed.view(spec.packed_shape(sizes)), scales, spec, sizes, out.dtype)
    widen = blockwise.dequantize_into if spec.entry.block is None else ggml_blocks.dequantize_into
    widen(q, out)


dequantize_4bit = registry.register("dequantize_4bit", "reference")(allocating(dequantize_4bit_out))


@registry.register("augmented_weight_", "reference")
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
    out[:, :columns] = dequantize_4bit(packed, scales, shape, format, block_size, double_quant, out.dtype)
    write_beside(out[:, columns:], b, scaling, first)


@registry.register("gemv_4bit", "reference")
def gemv_4bit(
    x: Tensor, packed: Tensor, scales: Tensor, shape: list[int], format: str, block_size: int, double_quant: bool
) -> Tensor:
    weight = dequantize_4bit(packed, scales, shape, format, block_size, double_quant, x.dtype)
    return x @ weight.T
