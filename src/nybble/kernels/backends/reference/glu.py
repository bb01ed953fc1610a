import math

import torch
from torch import Tensor

from nybble.kernels import registry


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


@registry.register("geglu_out", "reference")
def geglu_out(gate: Tensor, up: Tensor, out: Tensor) -> None:
    gelu, _ = _gelu(gate.float())
    out.copy_(gelu * up.float())


@registry.register("geglu_backward_out", "reference")
def geglu_backward_out(
    grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, act: Tensor | None
) -> None:
    d, u = grad.float(), up.float()
    gelu, slope = _gelu(gate.float())
    results = d * u * slope, d * gelu, gelu * u
    for out, result in zip((grad_gate, grad_up, act), results, strict=True):
        if out is not None:
            out.copy_(result)


@registry.register("gelu_out", "reference")
def gelu_out(x: Tensor, out: Tensor) -> None:
    out.copy_(_gelu(x.float())[0])


@registry.register("gelu_backward_out", "reference")
def gelu_backward_out(grad: Tensor, x: Tensor, grad_x: Tensor, act: Tensor | None) -> None:
    gelu, slope = _gelu(x.float())
    grad_x.copy_(grad.float() * slope)
    if act is not None:
        act.copy_(gelu)


def _gelu(g: Tensor) -> tuple[Tensor, Tensor]:
    """GELU by its tanh approximation, and its slope. Beyond 16, tanh is 1 in fp32, and g³ might not be finite."""
    near = g.clamp(-16, 16)
    c = math.sqrt(2 / math.pi)
    tanh = torch.tanh(c * near * (1 + 0.044715 * near.square()))
    inner_slope = c * (1 + 3 * 0.044715 * near.square())
    return g * (1 + tanh) / 2, (1 + tanh + near * (1 - tanh.square()) * inner_slope) / 2
