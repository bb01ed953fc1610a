"""The plain-PyTorch bodies of block_ops.py, on every device: what the kernels are compared with."""

import torch
from torch import Tensor

from nybble.kernels import reference, registry
from nybble.kernels.block_ops import check_targets


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
    d, g, u = grad.float(), gate.float(), up.float()
    s = g.sigmoid()
    grad_gate.copy_(d * u * s * (1 + g * (1 - s)))
    grad_up.copy_(d * g * s)
    if act is not None:
        act.copy_(g * s * u)


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


@registry.register("gemv_4bit", "reference")
def gemv_4bit(
    x: Tensor, packed: Tensor, scales: Tensor, shape: list[int], format: str, block_size: int, double_quant: bool
) -> Tensor:
    weight = reference.dequantize_4bit(packed, scales, shape, format, block_size, double_quant, x.dtype)
    return x @ weight.T
