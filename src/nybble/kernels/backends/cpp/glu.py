"""csrc/glu.cpp."""

from torch import Tensor

from nybble.kernels import registry
from nybble.kernels.backends.cpp.library import DTYPES, INT, INT64, ROWS, function, no_fp16, rows

_FORWARD, _BACKWARD = (*ROWS * 2, INT, INT64, INT64, *ROWS), (*ROWS * 3, INT, INT64, INT64, *ROWS * 3)
_swiglu, _swiglu_backward = function("swiglu", *_FORWARD), function("swiglu_backward", *_BACKWARD)
_geglu, _geglu_backward = function("geglu", *_FORWARD), function("geglu_backward", *_BACKWARD)


@registry.register("swiglu_out", "cpp", unsupported=no_fp16)
def swiglu_out(gate: Tensor, up: Tensor, out: Tensor) -> None:
    _swiglu(*rows(gate), *rows(up), DTYPES[gate.dtype], *gate.shape, *rows(out))


@registry.register("geglu_out", "cpp", unsupported=no_fp16)
def geglu_out(gate: Tensor, up: Tensor, out: Tensor) -> None:
    _geglu(*rows(gate), *rows(up), DTYPES[gate.dtype], *gate.shape, *rows(out))


@registry.register("swiglu_backward_out", "cpp", unsupported=no_fp16)
def swiglu_backward_out(
    grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, act: Tensor | None
) -> None:
    _swiglu_backward(
        *rows(grad), *rows(gate), *rows(up), DTYPES[gate.dtype], *gate.shape,
        *rows(grad_gate), *rows(grad_up), *rows(act),
    )  # fmt: skip


@registry.register("geglu_backward_out", "cpp", unsupported=no_fp16)
def geglu_backward_out(
    grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, act: Tensor | None
) -> None:
    _geglu_backward(
        *rows(grad), *rows(gate), *rows(up), DTYPES[gate.dtype], *gate.shape,
        *rows(grad_gate), *rows(grad_up), *rows(act),
    )  # fmt: skip
