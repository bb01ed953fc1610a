"""csrc/adamw.cpp."""

from torch import Tensor

from nybble.formats.codebooks import dynamic_map, dynamic_midpoints
from nybble.kernels import registry
from nybble.kernels.backends.cpp.library import FLOAT, INT64, POINTER, function, pointer

_adamw = function("adamw", *[POINTER] * 4, INT64, *[FLOAT] * 8)
_adamw_8bit = function("adamw_8bit", *[POINTER] * 10, INT64, *[FLOAT] * 8)


@registry.register("adamw_", "cpp")
def adamw_(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *numbers: float) -> None:
    _adamw(*map(pointer, (param, grad, exp_avg, exp_avg_sq)), param.numel(), *_adamw_numbers(*numbers))


@registry.register("adamw_8bit_", "cpp")
def adamw_8bit_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq_absmax: Tensor,
    *numbers: float,
) -> None:
    tables = [table(signed=signed) for signed in (True, False) for table in (dynamic_map, dynamic_midpoints)]
    states = (param, grad, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax)
    _adamw_8bit(*map(pointer, (*states, *tables)), param.numel(), *_adamw_numbers(*numbers))


def _adamw_numbers(
    step: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, grad_scale: float
) -> tuple[float, ...]:
    """What both kernels take after the number of elements."""
    corrected, root_correction = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    return 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, corrected, root_correction, eps, grad_scale
