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
