"""What a projection adds to the states of a decoder layer: x + factor * norm(projection(inputs))."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.kernels.slabs import empty_like
from nybble.layers.norms import Norm, Normed
from nybble.layers.projection import Projection


@dataclass
class Added:
    """What a projection back into the states leaves for backward."""

    z: Tensor | None  # (T, r)
    factor: float  # on what it adds
    normed: Normed | None = None  # its result, where that is normed

    def backward(self, grad: Tensor) -> Tensor:
        """From the gradient of the states, (T, hidden) or wider, to that of the projection's result."""
        grad = scaled(grad, self.factor)
        return grad if self.normed is None else self.normed.backward(grad[:, : self.normed.before.shape[1]])


def add_projection(
    projection: Projection, norm: Norm | None, factor: float, inputs: Tensor, x: Tensor
) -> tuple[Tensor, Added]:
    """x + factor * norm(projection(inputs))"""
    z = projection.low_rank(inputs)
    if norm is None:
        return projection.forward(inputs, z, residual=x, factor=factor), Added(z, factor)
    before = projection.forward(inputs, z)[:, : projection.out_features]
    normed, stats = norm.forward(before)
    return torch.add(x, normed, alpha=factor, out=normed), Added(z, factor, Normed(norm, before, stats))


def scaled(grad: Tensor, factor: float) -> Tensor:
    """factor * grad; itself where that is the same."""
    return grad if factor == 1.0 else torch.mul(grad, factor, out=empty_like(grad))
