import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.formats.codebooks import dynamic_map, dynamic_midpoints
from nybble.kernels import registry
from nybble.kernels.ops.optimizer import ADAMW_BLOCK, SIGNED_ZERO

ADAMW_CHUNK = 2**20  # elements whose moments are in fp32 at a time
TINIEST = 1e-38  # smaller scales count as it when dividing


@registry.register("adamw_", "reference")
def adamw_(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *numbers: float) -> None:
    step, lr, beta1, beta2, eps, weight_decay, grad_scale = numbers
    g = grad * grad_scale
    param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


@registry.register("adamw_8bit_", "reference")
def adamw_8bit_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq_absmax: Tensor,
    *numbers: float,
) -> None:
    mean, square = (exp_avg.view(-1), exp_avg_absmax), (exp_avg_sq.view(-1), exp_avg_sq_absmax)
    for start in range(0, param.numel(), ADAMW_CHUNK):
        elements = slice(start, start + ADAMW_CHUNK)
        blocks = slice(start // ADAMW_BLOCK, (start + ADAMW_CHUNK) // ADAMW_BLOCK)
        first = _dequantize_moment(mean[0][elements], mean[1][blocks], signed=True)
        second = _dequantize_moment(square[0][elements], square[1][blocks], signed=False)
        adamw_(param.view(-1)[elements], grad.view(-1)[elements], first, second, *numbers)
        _quantize_moment(first, mean[0][elements], mean[1][blocks], signed=True)
        _quantize_moment(second, square[0][elements], square[1][blocks], signed=False)


def _dequantize_moment(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    values = dynamic_map(codes.device, signed).index_select(0, codes.int())
    return values.mul_(absmax.repeat_interleave(ADAMW_BLOCK)[: len(values)])


def _quantize_moment(values: Tensor, codes: Tensor, absmax: Tensor, signed: bool) -> None:
    blocks = F.pad(values, (0, -len(values) % ADAMW_BLOCK)).view(-1, ADAMW_BLOCK)
    torch.amax(blocks.abs(), dim=1, out=absmax)
    scaled = blocks / absmax.clamp(min=TINIEST)[:, None]  # of zeros, zeros
    nearest = torch.bucketize(scaled, dynamic_midpoints(codes.device, signed), out_int32=True)
    if signed:
        nearest -= ((blocks < 0) & (nearest == SIGNED_ZERO)).int()
    codes.copy_(nearest.view(-1)[: len(codes)])
