"""csrc/quantize.cpp, dequantize.cpp, ggml_blocks.cpp, gemv.cpp."""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.formats import blockwise, codebooks
from nybble.formats.double_quant import quantize_scales
from nybble.formats.format import named_format
from nybble.formats.ggml_blocks import WIDENING
from nybble.formats.quant_spec import QuantSpec
from nybble.formats.quantized_tensor import ScaleParts, split_scales
from nybble.kernels import registry
from nybble.kernels.backends.cpp.library import DTYPES, FLOAT, INT, INT64, POINTER, function, no_fp16, pointer
from nybble.kernels.ops.four_bit import allocating

_quantize = function("quantize", POINTER, INT, INT64, INT64, INT, POINTER, POINTER, POINTER, POINTER, POINTER)
_quantize_scales = function("quantize_scales", POINTER, INT64, FLOAT, POINTER, POINTER, POINTER, POINTER)
_dequantize = function("dequantize", *[POINTER] * 8, INT, INT64, INT64, INT, POINTER)
_dequantize_blocks = function("dequantize_blocks", POINTER, INT, INT64, INT64, INT64, INT, POINTER)
_gemv = function("gemv", POINTER, INT, INT64, INT64, INT64, POINTER, *[POINTER] * 6, POINTER, FLOAT, INT64, POINTER)


@registry.register("quantize_4bit", "cpp")
def quantize_4bit(weight: Tensor, format: str, block_size: int, double_quant: bool) -> tuple[Tensor, Tensor]:
    spec = QuantSpec(format, block_size, double_quant)
    numel = weight.numel()
    packed = weight.new_empty(spec.packed_shape(tuple(weight.shape)), dtype=torch.uint8)
    scales = weight.new_empty(spec.scales_bytes(numel), dtype=torch.uint8)
    parts = split_scales(scales, spec, numel)
    absmax = weight.new_empty(spec.num_blocks(numel), dtype=torch.float32) if parts.absmax is None else parts.absmax
    _quantize(
        pointer(weight), DTYPES[weight.dtype], numel, block_size, spec.bits,
        pointer(codebooks.midpoints(format)), pointer(codebooks.sorted_order(format)),
        pointer(packed), pointer(absmax), pointer(parts.zero_points),
    )  # fmt: skip
    if not absmax.isfinite().all():
        blockwise.quantize(weight, spec)  # raises, and says what is wrong with the weight
    if double_quant:
        _quantize_scales_into(absmax, parts)
    return packed, scales


def _quantize_scales_into(absmax: Tensor, parts: ScaleParts) -> None:
    assert parts.offset is not None and parts.codes is not None and parts.absmax2 is not None
    parts.offset.copy_(absmax.mean())
    offset = parts.offset.item()
    midpoints, first_code = code_search()
    _quantize_scales(
        pointer(absmax), absmax.numel(), offset, pointer(midpoints), pointer(first_code),
        pointer(parts.codes), pointer(parts.absmax2),
    )  # fmt: skip
    if not (math.isfinite(offset) and parts.absmax2.isfinite().all()):
        quantize_scales(absmax)  # raises, and says what is wrong


@functools.cache
def code_search() -> tuple[Tensor, Tensor]:
    """Midpoints of the 8-bit map and an infinity, fp32 [256]; for each 15-bit beginning of an fp32 value, the
    code of the least value that begins so, uint8 [32768]."""
    values = codebooks.dynamic_map()
    midpoints = (values[:-1] + values[1:]) / 2
    start = torch.arange(1 << 15, dtype=torch.int64) << 17
    least = torch.where(start < 1 << 31, start, start + (1 << 17) - 1)  # below zero, more bits mean less
    least = (least - ((least >> 31) << 32)).to(torch.int32).view(torch.float32)
    first_code = torch.bucketize(least.nan_to_num(0.0, torch.inf, -torch.inf), midpoints)
    return torch.cat([midpoints, torch.tensor([torch.inf])]), first_code.to(torch.uint8)


@registry.register("dequantize_4bit_out", "cpp")
def dequantize_4bit_out(
    packed: Tensor, scales: Tensor, shape: Sequence[int], format: str, block_size: int, double_quant: bool, out: Tensor
) -> None:
    if (block := named_format(format).block) is not None:
        kind = list(WIDENING).index(format)
        _dequantize_blocks(
            pointer(packed), kind, out.numel(), block.size, block.num_bytes, DTYPES[out.dtype], pointer(out)
        )
        return
    _dequantize(
        pointer(packed), *scale_pointers(scales, format, block_size, double_quant, out.numel()),
        pointer(_sixteen_values(format)), named_format(format).bits,
        out.numel(), block_size, DTYPES[out.dtype], pointer(out),
    )  # fmt: skip


dequantize_4bit = registry.register("dequantize_4bit", "cpp")(allocating(dequantize_4bit_out))


@registry.register("gemv_4bit", "cpp", no_fp16)
def gemv_4bit(
    x: Tensor, packed: Tensor, scales: Tensor, shape: list[int], format: str, block_size: int, double_quant: bool
) -> Tensor:
    if named_format(format).bits != 4:  # no fused body: the weight is made, then multiplied
        return x @ dequantize_4bit(packed, scales, shape, format, block_size, double_quant, x.dtype).T
    out_features, in_features = shape
    codebook, factor = codebook_for_bf16(format)
    y = torch.empty(x.shape[0], out_features, dtype=x.dtype)
    _gemv(
        pointer(x), DTYPES[x.dtype], x.shape[0], in_features, out_features, pointer(packed),
        *scale_pointers(scales, format, block_size, double_quant, out_features * in_features),
        pointer(codebook), factor, block_size, pointer(y),
    )  # fmt: skip
    return y


def scale_pointers(
    scales: Tensor, format: str, block_size: int, double_quant: bool, numel: int
) -> tuple[int | None, ...]:
    """The six scale arguments of the kernels, in the order of `Scales` in csrc/four_bit.h."""
    absmax, codes, absmax2, offset, zero_points = _scale_offsets(format, block_size, double_quant, numel)
    base = scales.data_ptr()
    return (
        None if absmax is None else base + absmax,
        None if codes is None else base + codes,
        None if codes is None else codebooks.dynamic_map().data_ptr(),
        None if absmax2 is None else base + absmax2,
        None if offset is None else base + offset,
        None if zero_points is None else base + zero_points,
    )


@functools.cache
def _scale_offsets(format: str, block_size: int, double_quant: bool, numel: int) -> tuple[int | None, ...]:
    """Where the parts begin in a scales tensor, in bytes. Kept: views made at every call would cost generation more
    than small products do."""
    spec = QuantSpec(format, block_size, double_quant)
    layout = torch.empty(spec.scales_bytes(numel), dtype=torch.uint8, device="cpu")
    parts = split_scales(layout, spec, numel)
    return tuple(
        None if part is None else part.data_ptr() - layout.data_ptr()
        for part in (parts.absmax, parts.codes, parts.absmax2, parts.offset, parts.zero_points)
    )


@functools.cache
def _sixteen_values(format: str) -> Tensor:
    """A format's values, padded with zeros: a lookup reads a whole register."""
    values = codebooks.codebook(format)
    return F.pad(values, (0, 16 - len(values)))


@functools.cache
def codebook_for_bf16(format: str) -> tuple[Tensor, float]:
    """The codebook times a factor, and that factor in [1, 2): the one for which rounding to bf16 changes least.

    The integer formats and fp4 become exact; nf4's relative error falls from 0.0014 to 0.0008 (root of the mean
    square), under the 0.001 of weights that were dequantised to bf16.
    """
    if named_format(format).zero_points:  # integers already; zero points are subtracted from them
        return codebooks.codebook(format), 1.0
    factors = torch.linspace(1, 2, 4097)[:-1]  # 7 / 4 and 12 / 8 are among them
    scaled = codebooks.codebook(format) * factors[:, None]  # (candidates, 16)
    error = (scaled.bfloat16().float() / scaled - 1).nan_to_num()  # 0 / 0 is the zero level
    best = int(error.square().sum(1).argmin())
    return scaled[best], float(factors[best])
