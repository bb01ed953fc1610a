"""SwiGLU, GeGLU and GELU of rows, each apart by a stride.

With tanh, GELU is g · sigmoid(a(g)), a(g) = 2√(2/π) · (g + 0.044715 g³): the interpreter has no tanh.
"""

import triton
import triton.language as tl

from nybble.kernels.backends.triton.jit.language import rounded, tile

TWICE_ROOT = tl.constexpr(1.5957691216057308)  # 2√(2/π)


@triton.jit(do_not_specialize=["rows"])
def glu_kernel(
    gate, up, out, gate_stride, up_stride, out_stride, rows, width,
    GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, inside = tile(rows, width, ROWS, COLUMNS)
    row = row.to(tl.int64)
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        s, _ = _sigmoid_and_slope(g)
    else:
        s = tl.sigmoid(g)
    tl.store(out + row * out_stride + column, rounded(g * s * u, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def glu_backward_kernel(
    grad, gate, up, grad_gate, grad_up, act,
    grad_stride, gate_stride, up_stride, grad_gate_stride, grad_up_stride, act_stride, rows, width,
    GELU: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`act` is written with ACT only."""
    row, column, inside = tile(rows, width, ROWS, COLUMNS)
    row = row.to(tl.int64)
    d = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.debug_barrier()  # outputs may be inputs that they are not made of, and stored by other threads than have read
    if GELU:
        s, slope = _sigmoid_and_slope(g)
        for_gate = d * u * (s + g * slope)
    else:
        s = tl.sigmoid(g)
        for_gate = d * u * s * (1 + g * (1 - s))
    tl.store(grad_gate + row * grad_gate_stride + column, rounded(for_gate, grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + row * grad_up_stride + column, rounded(d * g * s, grad_up.dtype.element_ty), mask=inside)
    if ACT:
        tl.store(act + row * act_stride + column, rounded(g * s * u, act.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def gelu_kernel(x, out, x_stride, out_stride, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, inside = tile(rows, width, ROWS, COLUMNS)
    row = row.to(tl.int64)
    g = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    s, _ = _sigmoid_and_slope(g)
    tl.store(out + row * out_stride + column, rounded(g * s, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def gelu_backward_kernel(
    grad, x, grad_x, act, grad_stride, x_stride, grad_x_stride, act_stride, rows, width,
    ACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`act` is written with ACT only."""
    row, column, inside = tile(rows, width, ROWS, COLUMNS)
    row = row.to(tl.int64)
    d = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.debug_barrier()  # as above
    s, slope = _sigmoid_and_slope(g)
    tl.store(grad_x + row * grad_x_stride + column, rounded(d * (s + g * slope), grad_x.dtype.element_ty), mask=inside)
    if ACT:
        tl.store(act + row * act_stride + column, rounded(g * s, act.dtype.element_ty), mask=inside)


@triton.jit
def _sigmoid_and_slope(g):
    """sigmoid(a(g)) and its derivative by g. Beyond 16 it is 0 or 1 in fp32, and g³ might not be finite."""
    near = tl.minimum(tl.maximum(g, -16.0), 16.0)
    cubic = 0.044715 * near * near
    s = tl.sigmoid(near * TWICE_ROOT * (1 + cubic))
    return s, s * (1 - s) * TWICE_ROOT * (1 + 3 * cubic)
