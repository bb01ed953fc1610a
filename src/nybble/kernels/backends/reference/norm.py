import torch
from torch import Tensor

from nybble.kernels import registry


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


@registry.register("layer_norm_out", "reference")
def layer_norm_out(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor) -> Tensor:
    wide = x.float()
    mean = wide.mean(-1, keepdim=True)
    centred = wide - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    result = centred * rstd * weight.float()
    out.copy_(result if bias is None else result + bias.float())
    return torch.cat([mean, rstd], dim=-1)


@registry.register("layer_norm_backward_out", "reference")
def layer_norm_backward_out(
    grad: Tensor, x: Tensor, weight: Tensor, stats: Tensor, accumulate: bool, out: Tensor
) -> None:
    mean, rstd = stats.split(1, dim=-1)
    g = grad.float() * weight.float()
    n = (x.float() - mean) * rstd
    result = (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True)) * rstd
    out.copy_(result + out.float() if accumulate else result)
