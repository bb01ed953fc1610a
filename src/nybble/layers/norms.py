"""Norms over transformers' modules, forward and backward, as decoder blocks compute them.

RMSNorm: arXiv 1910.07467. LayerNorm: arXiv 1607.06450.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nybble.families import family_of
from nybble.families.family import Family
from nybble.kernels.ops.norm import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward
from nybble.kernels.slabs import empty_like, rows_at
from nybble.layers.trained import TrainedModule, frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _OverModule:
    module: Any
    eps: float

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.module.weight
        return weight.detach()


@dataclass(frozen=True)
class RMSNorm(_OverModule):
    """Over a module's weight.

    Args:
        offset: added to the weight.
    """

    offset: float

    def forward(self, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The normed rows and 1 / RMS of each."""
        return rms_norm(x, self.weight, self.eps, self.offset, out=out)

    def backward(
        self, grad: Tensor, x: Tensor, rstd: Tensor, out: Tensor | None = None, accumulate: bool = False
    ) -> Tensor:
        return rms_norm_backward(grad, x, self.weight, rstd, self.offset, out=out, accumulate=accumulate)


@dataclass(frozen=True)
class LayerNorm(_OverModule):
    """Over a module's weight and, where it has one, bias."""

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()

    def forward(self, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The normed rows, and mean and 1 / standard deviation of each."""
        return layer_norm(x, self.weight, self.bias, self.eps, out=out)

    def backward(
        self, grad: Tensor, x: Tensor, stats: Tensor, out: Tensor | None = None, accumulate: bool = False
    ) -> Tensor:
        return layer_norm_backward(grad, x, self.weight, stats, out=out, accumulate=accumulate)


@dataclass(frozen=True)
class HeadsNorm:
    """LayerNorm of each head of rows (T, heads, head_dim), over a module that has a weight of its own for each."""

    module: Any
    eps: float

    @property
    def weight(self) -> Tensor:
        """(heads, head_dim)"""
        weight = getattr(self.module, "weight", None)
        return torch.stack([norm.weight for norm in self.module.norms]).detach() if weight is None else weight.detach()

    def forward(self, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The normed rows, and of each head mean and 1 / standard deviation."""
        out, weight = empty_like(x) if out is None else out, self.weight
        stats = [layer_norm(x[:, i], each, None, self.eps, out=out[:, i])[1] for i, each in enumerate(weight)]
        return out, torch.stack(stats)

    def backward(
        self, grad: Tensor, x: Tensor, stats: Tensor, out: Tensor | None = None, accumulate: bool = False
    ) -> Tensor:
        out = empty_like(x) if out is None else out
        for i, (weight, each) in enumerate(zip(self.weight, stats, strict=True)):
            layer_norm_backward(grad[:, i], x[:, i], weight, each, out=out[:, i], accumulate=accumulate)
        return out


Norm = RMSNorm | LayerNorm | HeadsNorm


@dataclass
class Normed:
    """What the backward of a norm needs."""

    norm: Norm
    before: Tensor  # (T, width) or (T, heads, head_dim)
    stats: Tensor  # of each row, what its norm's backward needs

    def backward(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        return self.norm.backward(grad, self.before, self.stats, out=out)


def norm_over(module: Any, family: Family, config: Any, ones: Tensor | None = None) -> Norm:
    """The norm that a module of the family's models computes.

    Args:
        ones: its weight, where the module has none.
    """
    eps = getattr(config, family.norm_eps)
    weight = getattr(frozen(module), "weight", None)
    if hasattr(module, "norms") or (weight is not None and weight.dim() == 2):
        return HeadsNorm(module, eps)
    if weight is None:
        module = SimpleNamespace(weight=ones)
    return LayerNorm(module, eps) if family.norm == "layer" else RMSNorm(module, eps, family.norm_offset)


def final_norm(model: "PreTrainedModel") -> Norm:
    """What comes between a model's last block and its head."""
    config = model.config.get_text_config()
    family = family_of(config)
    assert family is not None, config.model_type
    return norm_over(model.base_model.get_submodule(family.final_norm), family, config)


class _NormedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor, norm: Norm) -> Tensor:
        rows = rows_at(x, positions)
        normed, stats = norm.forward(rows)
        ctx.norm, ctx.length = norm, len(x)
        ctx.save_for_backward(rows, stats, positions)
        return normed

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, stats, positions = ctx.saved_tensors
        of_rows = ctx.norm.backward(grad_outputs[0], rows, stats)
        grad = empty_like(of_rows, (ctx.length, rows.shape[1])).zero_()
        return grad.index_add_(0, positions, of_rows), None, None


def normed_rows(norm: Norm, x: Tensor, positions: Tensor) -> Tensor:
    """The rows of x, (T, width), at these positions, int64 (N), normed, with their gradient; and that of the norm where
    it is trained, by autograd.
    """
    if isinstance(norm.module, TrainedModule):
        states: Tensor = norm.module(x.index_select(0, positions))
        return states
    return _NormedRows.apply(x, positions, norm)


def through_norm(norm: Norm | None, grad: Tensor, x: Tensor, stats: Tensor | None, out: Tensor) -> Tensor:
    """Add to `out` the gradient for x, from that for the normed rows, or for x itself where there is no norm."""
    if norm is None or stats is None:
        return out.add_(grad)
    return norm.backward(grad, x, stats, out=out, accumulate=True)
