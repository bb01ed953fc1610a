"""csrc/glu.cpp."""

from collections.abc import Callable

from torch import Tensor

from nybble.kernels import registry
from nybble.kernels.backends.cpp.library import DTYPES, INT, INT64, ROWS, function, no_fp16, rows


def _forward(gate_name: str) -> Callable[..., None]:
    kernel = function(gate_name, *ROWS * 2, INT, INT64, INT64, *ROWS)

    def body(gate: Tensor, up: Tensor, out: Tensor) -> None:
        kernel(*rows(gate), *rows(up), DTYPES[gate.dtype], *gate.shape, *rows(out))

    return body


def _backward(gate_name: str) -> Callable[..., None]:
    kernel = function(f"{gate_name}_backward", *ROWS * 3, INT, INT64, INT64, *ROWS * 3)

    def body(grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, act: Tensor | None) -> None:
        kernel(
            *rows(grad), *rows(gate), *rows(up), DTYPES[gate.dtype], *gate.shape,
            *rows(grad_gate), *rows(grad_up), *rows(act),
        )  # fmt: skip

    return body


for _name in ("swiglu", "geglu"):
    registry.register(f"{_name}_out", "cpp", unsupported=no_fp16)(_forward(_name))
    registry.register(f"{_name}_backward_out", "cpp", unsupported=no_fp16)(_backward(_name))


_gelu = function("gelu", *ROWS, INT, INT64, INT64, *ROWS)
_gelu_backward = function("gelu_backward", *ROWS * 2, INT, INT64, INT64, *ROWS * 2)


@registry.register("gelu_out", "cpp", unsupported=no_fp16)
def gelu_out(x: Tensor, out: Tensor) -> None:
    _gelu(*rows(x), DTYPES[x.dtype], *x.shape, *rows(out))


@registry.register("gelu_backward_out", "cpp", unsupported=no_fp16)
def gelu_backward_out(grad: Tensor, x: Tensor, grad_x: Tensor, act: Tensor | None) -> None:
    _gelu_backward(*rows(grad), *rows(x), DTYPES[x.dtype], *x.shape, *rows(grad_x), *rows(act))
