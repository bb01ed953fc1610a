"""Products of tokens with the matrices of the experts that they were sent to: each touched expert's matrix is made once
forward and once backward, and nothing dense is kept.

Rows lie sorted by expert. With an adapter on every expert (LoRA, arXiv 2106.09685) a row x of expert e gives
W_e·x + scaling·B_e·A_e·x.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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

    Attributes:
        turned_in_peft: as `ExpertShape` says.
    """

    turned_in_peft = False

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


@dataclass(frozen=True)
class ExpertAdapters:
    """A and B of every expert, or their gradients.

    Args:
        a: fp32 `(E, r, in)`.
        b: fp32 `(E, out, r)`.
        scaling: of B · A.
    """

    a: Tensor
    b: Tensor
    scaling: float

    def zeros_like(self) -> "ExpertAdapters":
        """For their gradients."""
        return ExpertAdapters(torch.zeros_like(self.a), torch.zeros_like(self.b), self.scaling)


class ExpertProjection:
    """One projection of all experts and the adapters beside it, an expert at a time and without autograd.

    Args:
        adapters: None where there are none, or they are switched off.
    """

    def __init__(self, matrices: ExpertMatrices, adapters: ExpertAdapters | None = None):
        self.matrices, self.adapters = matrices, adapters

    def forward(self, expert: int, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """x·Wᵀ + scaling·x·Aᵀ·Bᵀ, (rows, in) -> (rows, out).

        Args:
            weight: the expert's W in the dtype of x, `[out, in]`.
        """
        y = torch.mm(x, weight.T, out=out)
        if self.adapters is not None:
            z = x @ self.adapters.a[expert].to(x.dtype).T  # (rows, r)
            y.addmm_(z, self.adapters.b[expert].to(x.dtype).T, alpha=self.adapters.scaling)
        return y

    def backward_low_rank(self, expert: int, grad_y: Tensor) -> Tensor | None:
        """The gradient of x·Aᵀ, (rows, out) -> (rows, r); None without adapters."""
        if self.adapters is None:
            return None
        return (grad_y @ self.adapters.b[expert].to(grad_y.dtype)).mul_(self.adapters.scaling)

    def backward_input(
        self, expert: int, grad_y: Tensor, grad_z: Tensor | None, weight: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """The gradient of x, (rows, out) -> (rows, in)."""
        grad_x = torch.mm(grad_y, weight, out=out)
        if self.adapters is not None and grad_z is not None:
            grad_x.addmm_(grad_z, self.adapters.a[expert].to(grad_y.dtype))
        return grad_x

    def backward_adapters(
        self, expert: int, grad_y: Tensor, grad_z: Tensor | None, x: Tensor, grads: ExpertAdapters | None
    ) -> None:
        """Write an expert's part of the gradients of A and B."""
        if self.adapters is None or grad_z is None or grads is None:
            return
        grads.a[expert] = grad_z.T @ x
        z = (x @ self.adapters.a[expert].to(x.dtype).T).mul_(self.adapters.scaling)
        grads.b[expert] = (z.T @ grad_y).T  # oneDNN takes the other order at half the speed


class ExpertsProduct(torch.autograd.Function):
    """y = x·W_eᵀ + scaling·x·A_eᵀ·B_eᵀ of each expert's rows; gradients of x, and of A and B where they are given.

    Args:
        x: (rows, in), sorted by expert.
        counts: rows of each expert.
        matrices: W, which has no gradient.
        a, b: as `ExpertAdapters` has them, or None.
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
        projection = _projection(matrices, a, b, scaling)
        y, room = x.new_empty(len(x), matrices.out_features), _room(matrices, x)
        for expert, rows in touched(counts):
            projection.forward(expert, x[rows], matrices.dense(expert, room), out=y[rows])
        y[sum(counts) :].zero_()
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grad_outputs
        x, a, b = ctx.saved_tensors
        grad_y, matrices, room = grad_y.contiguous(), ctx.matrices, _room(ctx.matrices, grad_y)
        projection = _projection(matrices, a, b, ctx.scaling)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        learns = projection.adapters is not None and any(ctx.needs_input_grad[3:5])
        grads = projection.adapters.zeros_like() if learns and projection.adapters is not None else None
        for expert, rows in touched(ctx.counts):
            grad_z = projection.backward_low_rank(expert, grad_y[rows])
            if grad_x is not None:
                weight = matrices.dense(expert, room)
                projection.backward_input(expert, grad_y[rows], grad_z, weight, out=grad_x[rows])
            projection.backward_adapters(expert, grad_y[rows], grad_z, x[rows], grads)
        if grad_x is not None:
            grad_x[sum(ctx.counts) :].zero_()
        of_adapters = (None, None) if grads is None else (grads.a, grads.b)
        return grad_x, None, None, *of_adapters, None


def _projection(matrices: ExpertMatrices, a: Tensor | None, b: Tensor | None, scaling: float) -> ExpertProjection:
    return ExpertProjection(matrices, None if a is None or b is None else ExpertAdapters(a, b, scaling))


def touched(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and which."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _room(matrices: ExpertMatrices, like: Tensor) -> Tensor:
    """What every touched expert's matrix is written into."""
    return like.new_empty(matrices.out_features, matrices.in_features)
