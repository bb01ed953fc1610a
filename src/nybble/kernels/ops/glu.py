"""Gated linear units of rows (arXiv 2002.05202): SwiGLU, and GeGLU with the tanh approximation of GELU; and that alone.

    nybble::swiglu_out, geglu_out                     gate, up -> written into `out`
    nybble::swiglu_backward_out, geglu_backward_out   the gradients for gate and up, and the result once more
    nybble::gelu_out, gelu_backward_out               the same without a gate

Forward and backward are ops of their own, for modules that write their backward out. Arithmetic is fp32 with one
rounding to the result's dtype. Outputs may be inputs: elements are read before they are written.
"""

import torch
from torch import Tensor

from nybble.kernels import registry
from nybble.kernels.ops.checks import check_rows, nothing
from nybble.kernels.slabs import empty_like


def swiglu(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
    """`silu(gate) * up`.

    Args:
        gate, up: rows [tokens, width].
        out: rows like them, may be either; a fresh tensor where None.
    """
    out = empty_like(gate) if out is None else out
    torch.ops.nybble.swiglu_out(gate, up, out)
    return out


def geglu(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
    """`gelu(gate) * up`, gelu(g) = g/2 · (1 + tanh(√(2/π) · (g + 0.044715 g³))) (arXiv 1606.08415), as `swiglu`."""
    out = empty_like(gate) if out is None else out
    torch.ops.nybble.geglu_out(gate, up, out)
    return out


def gelu(x: Tensor, out: Tensor | None = None) -> Tensor:
    """`gelu(x)`, as in `geglu`.

    Args:
        x: rows [tokens, width].
        out: rows like x, may be x; a fresh tensor where None.
    """
    out = empty_like(x) if out is None else out
    torch.ops.nybble.gelu_out(x, out)
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
    grad_gate, grad_up = _gradients(gate, up, grad_gate, grad_up)
    torch.ops.nybble.swiglu_backward_out(grad, gate, up, grad_gate, grad_up, act)
    return grad_gate, grad_up


def geglu_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    grad_gate: Tensor | None = None,
    grad_up: Tensor | None = None,
    act: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of `geglu` for gate and up, as `swiglu_backward` gives those of `swiglu`."""
    grad_gate, grad_up = _gradients(gate, up, grad_gate, grad_up)
    torch.ops.nybble.geglu_backward_out(grad, gate, up, grad_gate, grad_up, act)
    return grad_gate, grad_up


def gelu_backward(grad: Tensor, x: Tensor, grad_x: Tensor | None = None, act: Tensor | None = None) -> Tensor:
    """The gradient of `gelu` for x.

    Args:
        grad, x: rows [tokens, width] of one shape and dtype.
        grad_x: where to put it, may be x; a fresh tensor where None.
        act: where to put gelu(x) once more, may be grad; not computed where None.
    """
    grad_x = empty_like(x) if grad_x is None else grad_x
    torch.ops.nybble.gelu_backward_out(grad, x, grad_x, act)
    return grad_x


def _gradients(gate: Tensor, up: Tensor, grad_gate: Tensor | None, grad_up: Tensor | None) -> tuple[Tensor, Tensor]:
    grad_gate = empty_like(gate) if grad_gate is None else grad_gate
    grad_up = empty_like(up) if grad_up is None else grad_up
    return grad_gate, grad_up


def _check_forward(gate: Tensor, up: Tensor, out: Tensor) -> None:
    check_rows(2, gate=gate, up=up, out=out)


def _check_backward(
    grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, act: Tensor | None
) -> None:
    check_rows(2, gate=gate, grad=grad, up=up, grad_gate=grad_gate, grad_up=grad_up)
    if act is not None:
        check_rows(2, gate=gate, act=act)


def _check_gelu(x: Tensor, out: Tensor) -> None:
    check_rows(2, x=x, out=out)


def _check_gelu_backward(grad: Tensor, x: Tensor, grad_x: Tensor, act: Tensor | None) -> None:
    check_rows(2, x=x, grad=grad, grad_x=grad_x, **({} if act is None else {"act": act}))


for _name in ("swiglu", "geglu"):
    registry.declare(f"{_name}_out", "(Tensor gate, Tensor up, Tensor(a!) out) -> ()", _check_forward, nothing)
    registry.declare(
        f"{_name}_backward_out",
        "(Tensor grad, Tensor gate, Tensor up, Tensor(a!) grad_gate, Tensor(b!) grad_up, Tensor(c!)? act) -> ()",
        _check_backward,
        nothing,
    )
registry.declare("gelu_out", "(Tensor x, Tensor(a!) out) -> ()", _check_gelu, nothing)
registry.declare(
    "gelu_backward_out",
    "(Tensor grad, Tensor x, Tensor(a!) grad_x, Tensor(b!)? act) -> ()",
    _check_gelu_backward,
    nothing,
)
