"""For its own formats: the bytes are the same, so its kernels serve.

The scales stay nybble's: double quantisation is decoded by nybble.formats.double_quant (one value per
block), and bitsandbytes gets fp32 scales.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nybble.formats.blockwise import block_scales, not_finite
from nybble.formats.double_quant import scale_parts
from nybble.formats.format import named_format
from nybble.formats.quant_spec import QuantSpec
from nybble.formats.quantized_tensor import QuantizedTensor, join_scales
from nybble.kernels import registry
from nybble.kernels.ops.four_bit import allocating


def _unsupported(*args: Any) -> str | None:
    format = next(arg for arg in args if isinstance(arg, str))
    return None if named_format(format).bitsandbytes else f"has no {format}"


def _ops() -> Any:
    """bitsandbytes' torch ops; imported late since that takes seconds."""
    import bitsandbytes  # noqa: F401

    return torch.ops.bitsandbytes


@registry.register("quantize_4bit", "bitsandbytes", _unsupported)
def quantize_4bit(weight: Tensor, format: str, block_size: int, double_quant: bool) -> tuple[Tensor, Tensor]:
    if not torch.isfinite(weight).all():  # its kernel would quantise them silently
        raise not_finite(weight)
    spec = QuantSpec(format, block_size, double_quant)
    packed, absmax = _ops().quantize_4bit(weight, block_size, format, torch.uint8)
    scales = join_scales(scale_parts(absmax, double_quant))
    return packed.view(spec.packed_shape(tuple(weight.shape))), scales


@registry.register("dequantize_4bit_out", "bitsandbytes", _unsupported)
def dequantize_4bit_out(
    packed: Tensor, scales: Tensor, shape: Sequence[int], format: str, block_size: int, double_quant: bool, out: Tensor
) -> None:
    sizes = tuple(shape)
    spec = QuantSpec(format, block_size, double_quant)
    q = QuantizedTensor(packed.view(spec.packed_shape(sizes)), scales, spec, sizes, out.dtype)
    _ops().dequantize_4bit.out(packed.view(-1, 1), block_scales(q), block_size, format, shape, out.dtype, out=out)


dequantize_4bit = registry.register("dequantize_4bit", "bitsandbytes", _unsupported)(allocating(dequantize_4bit_out))
