"""Products of tokens with the matrices of the experts that they were sent to: each touched expert's matrix is made once
forward and once backward, and nothing dense is kept.

Rows lie sorted by expert. With an adapter on every expert (LoRA, arXiv 2106.09685) a row x of expert e gives
W_e·x + scaling·B_e·A_e·x.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels.ops.four_bit import dequantize, dequantize_into


class Routed(NamedTuple):
    """Rows of tokens, sorted by the expert that each was sent to.

    Args:
        x: (rows, width).
        counts: rows of each expert; rows beyond their sum are of none.
    """

    x: Tensor
    counts: Sequence[int]


class ExpertMatrices(nn.Module):
    """One projection of all experts, frozen: E matrices `[out, in]` that a subclass has.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int):
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features

    def matrix(self, index: int) -> QuantizedTensor | Tensor:
        """One expert's matrix as it is kept."""
        raise NotImplementedError

    def dense(self, index: int, room: Tensor) -> Tensor:
        """One expert's matrix in the dtype of `room`, `[out, in]`, which may be written to."""
        matrix = self.matrix(index)
        if isinstance(matrix, Tensor):
            return matrix.to(room.dtype)
        dequantize_into(matrix, room)
        return room

    def widened(self, index: int, dtype: torch.dtype) -> Tensor:
        """One expert's matrix in memory of its own, `[out, in]`."""
        matrix = self.matrix(index)
        return matrix.to(dtype) if isinstance(matrix, Tensor) else dequantize(matrix, dtype)

    def forward(self, routed: Routed) -> Tensor:
        """(rows, in) -> (rows, out); zeros for rows of no expert."""
        y: Tensor = ExpertsProduct.apply(routed.x, routed.counts, self, None, None, 1.0)
        return y

    def extra_repr(self) -> str:
        return f"{self.num_experts} x ({self.in_features}, {self.out_features})"


class ExpertsProduct(torch.autograd.Function):
    """y = x·W_eᵀ + scaling·x·A_eᵀ·B_eᵀ of each expert's rows; gradients of x, and of A and B where they are given.

    Args:
        x: (rows, in), sorted by expert.
        counts: rows of each expert.
        matrices: W, which has no gradient.
        a, b: fp32 `(E, r, in)` and `(E, out, r)`, or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        counts: Sequence[int],
        matrices: ExpertMatrices,
        a: Tensor | None,
        b: Tensor | None,
        scaling: float,
    ) -> Tensor:
        ctx.counts, ctx.matrices, ctx.scaling = counts, matrices, scaling
        ctx.save_for_backward(x, a, b)
        y, room = x.new_empty(len(x), matrices.out_features), _room(matrices, x)
        for expert, rows in _touched(counts):
            torch.mm(x[rows], matrices.dense(expert, room).T, out=y[rows])
            if a is not None and b is not None:
                z = x[rows] @ a[expert].to(x.dtype).T  # (rows, r)
                y[rows].addmm_(z, b[expert].to(x.dtype).T, alpha=scaling)
        y[sum(counts) :].zero_()
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grad_outputs
        x, a, b = ctx.saved_tensors
        grad_y, scaling, room = grad_y.contiguous(), ctx.scaling, _room(ctx.matrices, grad_y)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_a = torch.zeros_like(a) if a is not None and ctx.needs_input_grad[3] else None
        grad_b = torch.zeros_like(b) if b is not None and ctx.needs_input_grad[4] else None
        for expert, rows in _touched(ctx.counts):
            if grad_x is not None:
                torch.mm(grad_y[rows], ctx.matrices.dense(expert, room), out=grad_x[rows])
            if a is None or b is None:
                continue
            own_a, own_b = a[expert].to(x.dtype), b[expert].to(x.dtype)
            grad_z = (grad_y[rows] @ own_b).mul_(scaling)  # (rows, r)
            if grad_x is not None:
                grad_x[rows].addmm_(grad_z, own_a)
            if grad_a is not None:
                grad_a[expert] = grad_z.T @ x[rows]
            if grad_b is not None:
                z = (x[rows] @ own_a.T).mul_(scaling)
                grad_b[expert] = (z.T @ grad_y[rows]).T
        if grad_x is not None:
            grad_x[sum(ctx.counts) :].zero_()
        return grad_x, None, None, grad_a, grad_b, None


def _touched(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and which."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _room(matrices: ExpertMatrices, like: Tensor) -> Tensor:
    """What every touched expert's matrix is written into."""
    return like.new_empty(matrices.out_features, matrices.in_features)
