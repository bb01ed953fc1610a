"""jit/norm.py."""

from typing import Any

import torch
from torch import Tensor

from nybble.kernels import registry
from nybble.kernels.backends.triton.launch import launch_tiles

MAX_WIDTH = 16384  # a row lies in the registers of one program


def _too_wide(x: Tensor, *others: Any) -> str | None:
    width = x.shape[-1]
    return None if width <= MAX_WIDTH else f"takes rows of at most {MAX_WIDTH:,} elements, not {width:,}"


@registry.register("rms_norm_out", "triton", _too_wide)
def rms_norm_out(x: Tensor, weight: Tensor, eps: float, weight_offset: float, out: Tensor) -> Tensor:
    from nybble.kernels.backends.triton.jit.norm import rms_norm_kernel

    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    launch_tiles(
        rms_norm_kernel, rstd.numel(), x.shape[-1],
        x, weight, out, rstd, _heads(x), x.stride(0), out.stride(0), eps, weight_offset,
        whole_rows=True,
    )  # fmt: skip
    return rstd


@registry.register("rms_norm_backward_out", "triton", _too_wide)
def rms_norm_backward_out(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float, accumulate: bool, out: Tensor
) -> None:
    from nybble.kernels.backends.triton.jit.norm import rms_norm_backward_kernel

    launch_tiles(
        rms_norm_backward_kernel, rstd.numel(), x.shape[-1],
        grad, x, weight, rstd, out, _heads(x), grad.stride(0), x.stride(0), out.stride(0), weight_offset,
        whole_rows=True, ACCUMULATE=accumulate,
    )  # fmt: skip


def _heads(x: Tensor) -> int:
    return x.shape[1] if x.dim() == 3 else 1


@registry.register("layer_norm_out", "triton", _too_wide)
def layer_norm_out(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor) -> Tensor:
    from nybble.kernels.backends.triton.jit.norm import layer_norm_kernel

    stats = torch.empty((*x.shape[:-1], 2), dtype=torch.float32, device=x.device)
    launch_tiles(
        layer_norm_kernel, stats.numel() // 2, x.shape[-1],
        x, weight, weight if bias is None else bias, out, stats, _heads(x), x.stride(0), out.stride(0), eps,
        whole_rows=True, BIAS=bias is not None,
    )  # fmt: skip
    return stats


@registry.register("layer_norm_backward_out", "triton", _too_wide)
def layer_norm_backward_out(
    grad: Tensor, x: Tensor, weight: Tensor, stats: Tensor, accumulate: bool, out: Tensor
) -> None:
    from nybble.kernels.backends.triton.jit.norm import layer_norm_backward_kernel

    launch_tiles(
        layer_norm_backward_kernel, stats.numel() // 2, x.shape[-1],
        grad, x, weight, stats, out, _heads(x), grad.stride(0), x.stride(0), out.stride(0),
        whole_rows=True, ACCUMULATE=accumulate,
    )  # fmt: skip
