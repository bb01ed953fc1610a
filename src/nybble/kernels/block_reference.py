"""The plain-PyTorch bodies of block_ops.py, on every device: what the kernels are compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.formats.codebooks import dynamic_map, dynamic_midpoints
from nybble.kernels import reference, registry
from nybble.kernels.block_ops import ADAMW_BLOCK, check_targets

ADAMW_CHUNK = 2**20  # elements whose moments are in fp32 at a time
SIGNED_ZERO = 127  # the signed dynamic map's code for 0
TINIEST = 1e-38  # smaller scales count as it when dividing


@registry.register("rms_norm_out", "reference")
def rms_norm_out(x: Tensor, weight: Tensor, eps: float, weight_offset: float, out: Tensor) -> Tensor:
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    out.copy_(wide * rstd[..., None] * (weight.float() + weight_offset))
    return rstd


@registry.register("rms_norm_backward_out", "reference")
def rms_norm_backward_out(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float, accumulate: bool, out: Tensor
) -> None:
    g = grad.float() * (weight.float() + weight_offset)
    n = x.float() * rstd[..., None]
    result = (g - n * (g * n).mean(-1, keepdim=True)) * rstd[..., None]
    out.copy_(result + out.float() if accumulate else result)


@registry.register("rms_norm_weight_gradient", "reference")
def rms_norm_weight_gradient(grad: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    return (grad.float() * x.float() * rstd[..., None]).flatten(0, -2).sum(0)


@registry.register("rope_", "reference")
def rope_(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> None:
    half = cos.shape[-1]
    cos, sin = cos[:, None], -sin[:, None] if backward else sin[:, None]  # (tokens, 1, half)
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = first * cos - second * sin, second * cos + first * sin  # both before either overwrites its input
    x[..., :half], x[..., half : 2 * half] = turned


@registry.register("swiglu_out", "reference")
def swiglu_out(gate: Tensor, up: Tensor, out: Tensor) -> None:
    wide = gate.float()
    out.copy_(wide * wide.sigmoid() * up.float())


@registry.register("swiglu_backward_out", "reference")
def swiglu_backward_out(
    grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, act: Tensor | None
) -> None:
    d, g, u = grad.float(), gate.float(), up.float()  # in fp32 the inputs themselves, not copies
    s = g.sigmoid()
    results = d * u * s * (1 + g * (1 - s)), d * g * s, g * s * u  # all before any overwrites what it is made of
    for out, result in zip((grad_gate, grad_up, act), results, strict=True):
        if out is not None:
            out.copy_(result)


@registry.register("cross_entropy_", "reference")
def cross_entropy_(logits: Tensor, targets: Tensor, gradient_scale: float) -> Tensor:
    check_targets(targets, logits.shape[1])
    supervised, column = targets >= 0, targets.clamp(min=0)[:, None]
    log_probabilities = logits.float().log_softmax(1)
    losses = -log_probabilities.gather(1, column).squeeze(1)
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(1, column, torch.full_like(losses, -1.0)[:, None])
    logits.copy_(torch.where(supervised[:, None], gradient.mul_(gradient_scale), 0.0))
    return torch.where(supervised, losses, 0.0)


@registry.register("adamw_", "reference")
def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float,
) -> None:
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


@registry.register("gemv_4bit", "reference")
def gemv_4bit(
    x: Tensor, packed: Tensor, scales: Tensor, shape: list[int], format: str, block_size: int, double_quant: bool
) -> Tensor:
    weight = reference.dequantize_4bit(packed, scales, shape, format, block_size, double_quant, x.dtype)
    return x @ weight.T
