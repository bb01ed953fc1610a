"""jit/glu.py."""

from torch import Tensor

from nybble.kernels import registry
from nybble.kernels.backends.triton.launch import launch_tiles


def _forward(gate: Tensor, up: Tensor, out: Tensor, gelu: bool) -> None:
    from nybble.kernels.backends.triton.jit.glu import glu_kernel

    launch_tiles(glu_kernel, *gate.shape, gate, up, out, gate.stride(0), up.stride(0), out.stride(0), GELU=gelu)


def _backward(
    grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, act: Tensor | None, gelu: bool
) -> None:
    from nybble.kernels.backends.triton.jit.glu import glu_backward_kernel

    tensors = grad, gate, up, grad_gate, grad_up, grad if act is None else act
    strides = (tensor.stride(0) for tensor in tensors)
    launch_tiles(glu_backward_kernel, *gate.shape, *tensors, *strides, GELU=gelu, ACT=act is not None)


@registry.register("swiglu_out", "triton")
def swiglu_out(gate: Tensor, up: Tensor, out: Tensor) -> None:
    _forward(gate, up, out, gelu=False)


@registry.register("geglu_out", "triton")
def geglu_out(gate: Tensor, up: Tensor, out: Tensor) -> None:
    _forward(gate, up, out, gelu=True)


@registry.register("swiglu_backward_out", "triton")
def swiglu_backward_out(
    grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, act: Tensor | None
) -> None:
    _backward(grad, gate, up, grad_gate, grad_up, act, gelu=False)


@registry.register("geglu_backward_out", "triton")
def geglu_backward_out(
    grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, act: Tensor | None
) -> None:
    _backward(grad, gate, up, grad_gate, grad_up, act, gelu=True)


@registry.register("gelu_out", "triton")
def gelu_out(x: Tensor, out: Tensor) -> None:
    from nybble.kernels.backends.triton.jit.glu import gelu_kernel

    launch_tiles(gelu_kernel, *x.shape, x, out, x.stride(0), out.stride(0))


@registry.register("gelu_backward_out", "triton")
def gelu_backward_out(grad: Tensor, x: Tensor, grad_x: Tensor, act: Tensor | None) -> None:
    from nybble.kernels.backends.triton.jit.glu import gelu_backward_kernel

    tensors = grad, x, grad_x, grad if act is None else act
    strides = (tensor.stride(0) for tensor in tensors)
    launch_tiles(gelu_backward_kernel, *x.shape, *tensors, *strides, ACT=act is not None)
