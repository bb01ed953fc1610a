"""csrc/swiglu.cpp."""

from torch import Tensor

from nybble.kernels import registry
from nybble.kernels.backends.cpp.library import DTYPES, INT, INT64, ROWS, function, no_fp16, rows

_swiglu = function("swiglu", *ROWS, *ROWS, INT, INT64, INT64, *ROWS)
_swiglu_backward = function("swiglu_backward", *ROWS * 3, INT, INT64, INT64, *ROWS * 3)


@registry.register("swiglu_out", "cpp", unsupported=no_fp16)
def swiglu_out(gate: Tensor, up: Tensor, out: Tensor) -> None:
    _swiglu(*rows(gate), *rows(up), DTYPES[gate.dtype], *gate.shape, *rows(out))


@registry.register("swiglu_backward_out", "cpp", unsupported=no_fp16)
def swiglu_backward_out(
    grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, act: Tensor | None
) -> None:
    _swiglu_backward(
        *rows(grad), *rows(gate), *rows(up), DTYPES[gate.dtype], *gate.shape,
        *rows(grad_gate), *rows(grad_up), *rows(act),
    )  # fmt: skip
