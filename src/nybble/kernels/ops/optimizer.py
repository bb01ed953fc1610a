"""An optimizer step of one tensor, in place: `nybble::adamw_`, and `nybble::adamw_8bit_` with moments in 8 bits.

The tensor may be many parameters side by side, as `FlatParameters` of `training/optimizer.py` has them. Only `step`,
`lr` and `grad_scale` change from call to call; what a body makes of `step` are the two bias corrections, floats.
"""

import torch
from torch import Tensor

from nybble.errors import KernelError
from nybble.kernels import registry
from nybble.kernels.ops.checks import FP32, check_tensor, nothing

ADAMW_BLOCK = 256  # elements of an 8-bit moment that share a scale
SIGNED_ZERO = 127  # the signed dynamic map's code for 0; that of the other is 0


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
) -> None:
    """One AdamW step in place, as torch.optim.AdamW takes it (arXiv 1711.05101).

    How the elements are split into calls changes no bit of the result.

    Args:
        param, grad, exp_avg, exp_avg_sq: fp32, contiguous, one size; grad is not changed.
        step: 1 for the first.
        grad_scale: grad is multiplied by it first (clipping).
    """
    torch.ops.nybble.adamw_(param, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay, grad_scale)


def adamw_8bit_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq_absmax: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
) -> None:
    """`adamw_` with its moments in 8 bits between steps: codes of the dynamic map, a scale for each 256 elements.

    A step reads the moments, updates them and the parameter in fp32, and rounds the moments to the nearest code of
    their new scale. The parameter's update sees them unrounded. A mean that is negative never rounds to zero. (Dettmers
    et al. 2022, arXiv 2110.02861; as `kOptimizerStatic8bit2StateBlockwise` in bitsandbytes' csrc/kernels.cu.)
    Split into calls between two blocks of 256, it gives the same bits.

    Args:
        param, grad: fp32, contiguous, one size; grad is not changed.
        exp_avg, exp_avg_sq: uint8, contiguous, of that size; the second in the map without signs. Zeros at first.
        exp_avg_absmax, exp_avg_sq_absmax: fp32 `[ceil(numel / 256)]`; zeros at first.
        step: 1 for the first.
        grad_scale: grad is multiplied by it first (clipping).
    """
    torch.ops.nybble.adamw_8bit_(
        param, grad, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax,
        step, lr, beta1, beta2, eps, weight_decay, grad_scale,
    )  # fmt: skip


def _check_adamw(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, *numbers: float) -> None:
    _check_step(step)
    for name, tensor in (("param", param), ("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check_tensor(name, tensor, param, param.shape, FP32)


def _check_adamw_8bit(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq_absmax: Tensor,
    step: int,
    *numbers: float,
) -> None:
    _check_step(step)
    blocks = torch.Size((-(-param.numel() // ADAMW_BLOCK),))
    for name, tensor in (("param", param), ("grad", grad)):
        check_tensor(name, tensor, param, param.shape, FP32)
    for name, tensor in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check_tensor(name, tensor, param, param.shape, (torch.uint8,))
    for name, tensor in (("exp_avg_absmax", exp_avg_absmax), ("exp_avg_sq_absmax", exp_avg_sq_absmax)):
        check_tensor(name, tensor, param, blocks, FP32)


def _check_step(step: int) -> None:
    if step < 1:
        raise KernelError(f"AdamW step {step}.", "Steps are counted from 1.")


registry.declare(
    "adamw_",
    "(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, int step, float lr, float beta1,"
    " float beta2, float eps, float weight_decay, float grad_scale) -> ()",
    _check_adamw,
    nothing,
)
registry.declare(
    "adamw_8bit_",
    "(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) exp_avg_absmax,"
    " Tensor(e!) exp_avg_sq_absmax, int step, float lr, float beta1, float beta2, float eps, float weight_decay,"
    " float grad_scale) -> ()",
    _check_adamw_8bit,
    nothing,
)
