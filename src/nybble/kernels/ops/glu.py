"""SwiGLU of rows.

    nybble::swiglu_out            gate, up -> written into `out`
    nybble::swiglu_backward_out   the gradients for gate and up, and the result once more

Forward and backward are ops of their own, for modules that write their backward out. Arithmetic is fp32 with one
rounding to the result's dtype. Outputs may be inputs: elements are read before they are written.
"""

import torch
from torch import Tensor

from nybble.kernels import registry
from nybble.kernels.ops.checks import check_rows, nothing


def swiglu(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
    """`silu(gate) * up` (arXiv 2002.05202).

    Args:
        gate, up: rows [tokens, width].
        out: rows like them, may be either; a fresh tensor where None.
    """
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    torch.ops.nybble.swiglu_out(gate, up, out)
    return out


def swiglu_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    grad_gate: Tensor | None = None,
    grad_up: Tensor | None = None,
    act: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of `swiglu` for gate and up.

    Args:
        grad, gate, up: rows [tokens, width] of one shape and dtype.
        grad_gate, grad_up: where to put them, may be gate and up; fresh tensors where None.
        act: where to put silu(gate) * up once more, may be grad; not computed where None.
    """
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if grad_gate is None else grad_gate
    grad_up = torch.empty(up.shape, dtype=up.dtype, device=up.device) if grad_up is None else grad_up
    torch.ops.nybble.swiglu_backward_out(grad, gate, up, grad_gate, grad_up, act)
    return grad_gate, grad_up


def _check_swiglu(gate: Tensor, up: Tensor, out: Tensor) -> None:
    check_rows(2, gate=gate, up=up, out=out)


def _check_swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, act: Tensor | None
) -> None:
    check_rows(2, gate=gate, grad=grad, up=up, grad_gate=grad_gate, grad_up=grad_up)
    if act is not None:
        check_rows(2, gate=gate, act=act)


registry.declare("swiglu_out", "(Tensor gate, Tensor up, Tensor(a!) out) -> ()", _check_swiglu, nothing)


registry.declare(
    "swiglu_backward_out",
    "(Tensor grad, Tensor gate, Tensor up, Tensor(a!) grad_gate, Tensor(b!) grad_up, Tensor(c!)? act) -> ()",
    _check_swiglu_backward,
    nothing,
)
