"""A projection as one matrix product each way, for devices whose products are so quick that what lies between counts.

    x_wide  (T, in + R)          the input, and beside it z = x · [A₁; A₂; ..]ᵀ
    g_wide  (T, out + R)         the output's gradient, and beside it that of z
    W       (out + R, in + R)    above: the frozen weights, one under the other, and beside them the blocks
                                 scaling · Bᵢ, each in its own columns; below: A₁; A₂; .. (and what nothing reads)

    y  = x_wide · W[:out]ᵀ       base and adapters
    dx = g_wide · W[:, :in]

R is the sum of ranks, filled up to a multiple with zeros. `Projection` rounds y and dx after each of its products; here
nothing is rounded between. W is made anew in each pass, from four bits and the fp32 masters, so that no copies of the
adapters are kept; the recomputation of a block and its backward pass share it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nybble.kernels import registry
from nybble.kernels.hardware import gives_fp32
from nybble.kernels.ops.four_bit import augmented_weight_, write_beside
from nybble.layers.projection import DenseWeights, Projection
from nybble.sizes import RANK_MULTIPLE

ONE_PRODUCT = {"cuda": True}  # devices where one wide product is worth more than several


def projection_on(device_type: str) -> type[Projection]:
    """The class that computes a block's projections there."""
    wide = ONE_PRODUCT.get(device_type, False) and registry.runs(("augmented_weight_",), device_type) is None
    return AugmentedProjection if wide else Projection


class AugmentedProjection(Projection):
    """`Projection` over wide rows."""

    def __init__(self, modules: Sequence[nn.Module], weights: DenseWeights):
        super().__init__(modules, weights)
        beside = -(-self.ranks[-1].stop // RANK_MULTIPLE) * RANK_MULTIPLE
        self.in_width, self.out_width = self.in_features + beside, self.out_features + beside

    def refresh_adapters(self, dtype: torch.dtype) -> None:
        """There are no copies of them."""

    def low_rank(self, x: Tensor) -> Tensor | None:
        """As `Projection` says, (T, R)."""
        return self._input(x) @ self._below(x).T if self._adapted() else None

    def forward(self, x: Tensor, z: Tensor | None, residual: Tensor | None = None, factor: float = 1.0) -> Tensor:
        """As `Projection` says."""
        assert residual is not None or factor == 1.0
        rows, weight = self._input(x), self._weight(x)[: self.out_features]
        if z is None:
            weight = weight[:, : self.in_features]
        else:
            rows = _wide(x, self.in_features, z)
        if residual is None:
            y = x.new_empty(x.shape[0], self.out_width)
            part = torch.mm(rows, weight.T, out=y[:, : self.out_features])
        else:
            y = part = torch.addmm(residual, rows, weight.T, alpha=factor)
        for linear, columns in zip(self.linears, self.columns, strict=True):
            if linear.bias is not None:
                part[:, columns].add_(linear.bias.to(x.dtype), alpha=factor)
        return y

    def gradient(self, grad_y: Tensor) -> Tensor:
        """As `Projection` says."""
        wide = grad_y.new_empty(grad_y.shape[0], self.out_width)
        wide[:, : self.out_features] = grad_y
        return wide

    def backward_low_rank(self, grad_y: Tensor) -> Tensor | None:
        """As `Projection` says, (T, R)."""
        if not any(self.adapters):
            return None
        weight = self._weight(grad_y)
        return grad_y[:, : self.out_features] @ weight[: self.out_features, self.in_features :]

    def backward_input(self, grad_y: Tensor, grad_z: Tensor | None) -> Tensor:
        """As `Projection` says."""
        weight = self._weight(grad_y)[:, : self.in_features]
        if grad_z is None:
            return grad_y[:, : self.out_features] @ weight[: self.out_features]
        return _wide(grad_y, self.out_features, grad_z) @ weight

    def _over_tokens(self, a: Tensor, b: Tensor) -> Tensor:
        """As `Projection` says, but nothing is rounded: the gradients of micro-batches are added up in fp32."""
        if a.dtype == torch.float32 or not gives_fp32(a.device):
            return a.float() @ b.float()
        return torch.mm(a, b, out_dtype=torch.float32)

    def _input(self, x: Tensor) -> Tensor:
        return x[:, : self.in_features]

    def _below(self, like: Tensor) -> Tensor:
        """[A₁; A₂; ..], (R, in)."""
        return self._weight(like)[self.out_features :, : self.in_features]

    def _weight(self, like: Tensor) -> Tensor:
        shape = (self.out_width, self.in_width)
        return self.weights.made((self, self._adapted(), self._versions()), shape, like, self._write)

    @torch.no_grad()
    def _write(self, matrix: Tensor) -> None:
        """W, in the dtype of `matrix`."""
        below = matrix[self.out_features :, : self.in_features]
        below[self.ranks[-1].stop :].zero_()
        for linear, adapter, columns, ranks in self._parts():
            stored, rows = self.weights.stored(linear), matrix[columns]
            b, scaling = (None, 1.0) if adapter is None else (adapter.lora_B, adapter.scaling)
            if isinstance(stored, Tensor):
                rows[:, : self.in_features] = stored
                write_beside(rows[:, self.in_features :], b, scaling, ranks.start)
            else:
                augmented_weight_(rows, stored, b, scaling, ranks.start)
            scale = adapter.row_scale() if adapter is not None and self._adapted() else None
            if scale is not None:
                rows.mul_(scale.to(rows.dtype)[:, None])
            if adapter is not None:
                below[ranks] = adapter.lora_A


def _wide(x: Tensor, width: int, beside: Tensor) -> Tensor:
    """x with `beside` in the columns from `width` on: in place where it has them, else a copy."""
    wide = x
    if x.shape[1] == width:
        wide = x.new_empty(x.shape[0], width + beside.shape[1])
        wide[:, :width] = x
    wide[:, width:] = beside
    return wide
