"""Double quantisation: the fp32 scales of the blocks in 8 bits (QLoRA, arXiv 2305.14314, section 3).

    offset = mean(absmax);  absmax[i]  ~  dynamic_map[code[i]] * absmax2[i // 256] + offset

The nearest code is exact, in the arithmetic of bitsandbytes' CUDA kernel. bitsandbytes' CPU kernel
looks the code up in a table of 65,536 bins instead and now and then takes a neighbour.
"""

import torch
from torch import Tensor

from nybble.errors import FormatError
from nybble.formats.codebooks import dynamic_map, dynamic_midpoints
from nybble.formats.quant_spec import NESTED_BLOCK_SIZE
from nybble.formats.quantized_tensor import ScaleParts

MIN_SCALE = 1e-38  # scales below it count as it when dividing; bitsandbytes' figure


def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put block scales into 8 bits.

    Args:
        absmax: fp32 `[B]`, finite.

    Returns:
        codes uint8 `[B]`, absmax2 fp32 `[ceil(B / 256)]`, offset fp32 `[1]`.

    Raises:
        FormatError: the scales are so large that their mean overflows fp32.
    """
    offset = absmax.cpu().mean().reshape(1).to(absmax.device)  # there: what is stored does not depend on the device
    centred = absmax - offset
    whole = len(centred) - len(centred) % NESTED_BLOCK_SIZE
    absmax2 = centred[:whole].view(-1, NESTED_BLOCK_SIZE).abs().amax(dim=1)
    if whole < len(centred):
        absmax2 = torch.cat([absmax2, centred[whole:].abs().amax().reshape(1)])
    if not torch.isfinite(absmax2).all():  # nor is it where the offset is not
        raise FormatError(
            f"Weights of up to {absmax.abs().max().item():.3g} overflow fp32 in double quantisation.",
            fix="Quantise without double quantisation, or check the weights.",
        )
    scaled = centred * _spread(1.0 / absmax2.clamp(min=MIN_SCALE), len(centred))
    codes = torch.bucketize(scaled, dynamic_midpoints(scaled.device), out_int32=True).to(torch.uint8)
    return codes, absmax2, offset


def scale_parts(absmax: Tensor, double_quant: bool, zero_points: Tensor | None = None) -> ScaleParts:
    """What is stored of block scales, fp32 `[B]`; raises as `quantize_scales`."""
    if not double_quant:
        return ScaleParts(absmax=absmax, zero_points=zero_points)
    codes, absmax2, offset = quantize_scales(absmax)
    return ScaleParts(None, offset, absmax2, codes, zero_points)


def dequantize_scales(codes: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """The block scales back, fp32 `[B]`: a product, then a sum, each rounded to fp32 (no fused multiply-add).

    Args:
        codes: uint8 `[B]`.
        absmax2: fp32 `[ceil(B / 256)]`.
        offset: fp32 `[1]`.
    """
    scaled = dynamic_map(codes.device).index_select(0, codes.int())
    return scaled.mul_(_spread(absmax2, len(codes))).add_(offset)


def _spread(per_block: Tensor, length: int) -> Tensor:
    """One value per scale: [ceil(B / 256)] -> [B]."""
    return per_block.repeat_interleave(NESTED_BLOCK_SIZE)[:length]
