"""jit/optimizer.py. What changes from step to step is passed in floats: Triton compiles no other kernel for another."""

from torch import Tensor

from nybble.formats.codebooks import dynamic_map, dynamic_midpoints
from nybble.kernels import registry
from nybble.kernels.backends.triton.launch import TILE, launch
from nybble.kernels.ops.optimizer import ADAMW_BLOCK


@registry.register("adamw_", "triton")
def adamw_(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, *numbers: float) -> None:
    from nybble.kernels.backends.triton.jit.optimizer import adamw_kernel

    launch(
        adamw_kernel, -(-param.numel() // TILE),
        param, grad, exp_avg, exp_avg_sq, param.numel(), *_factors(step, *numbers), ELEMENTS=TILE,
    )  # fmt: skip


@registry.register("adamw_8bit_", "triton")
def adamw_8bit_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq_absmax: Tensor,
    step: int,
    *numbers: float,
) -> None:
    from nybble.kernels.backends.triton.jit.optimizer import adamw_8bit_kernel

    tables = (table(param.device, signed) for signed in (True, False) for table in (dynamic_map, dynamic_midpoints))
    launch(
        adamw_8bit_kernel, -(-param.numel() // TILE),
        param, grad, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, *tables, param.numel(),
        *_factors(step, *numbers), BLOCKS=TILE // ADAMW_BLOCK, BLOCK_SIZE=ADAMW_BLOCK,
    )  # fmt: skip


def _factors(
    step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, grad_scale: float
) -> tuple[float, ...]:
    """What an element is multiplied by, as `_updated` in jit/optimizer.py names it."""
    step_size, root = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    return grad_scale, 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, root, eps, -step_size
