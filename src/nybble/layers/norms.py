"""Norms over transformers' modules, forward and backward, as decoder blocks compute them.

RMSNorm: arXiv 1910.07467. LayerNorm: arXiv 1607.06450.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nybble.families import FAMILIES
from nybble.families.family import Family
from nybble.kernels.ops.norm import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward

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


Norm = RMSNorm | LayerNorm


@dataclass
class Normed:
    """What the backward of a norm needs."""

    norm: Norm
    before: Tensor  # (T, width) or (T, heads, head_dim)
    stats: Tensor  # of each row, what its norm's backward needs

    def backward(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        return self.norm.backward(grad, self.before, self.stats, out=out)


def norm_over(module: Any, family: Family, config: Any) -> Norm:
    """The norm that a module of the family's models computes."""
    eps = getattr(config, family.norm_eps)
    return LayerNorm(module, eps) if family.norm == "layer" else RMSNorm(module, eps, family.norm_offset)


def final_norm(model: "PreTrainedModel") -> Norm:
    """What comes between a model's last block and its head."""
    config = model.config.get_text_config()
    family = FAMILIES[config.model_type]
    return norm_over(model.base_model.get_submodule(family.final_norm), family, config)


def through_norm(norm: Norm | None, grad: Tensor, x: Tensor, stats: Tensor | None, out: Tensor) -> Tensor:
    """Add to `out` the gradient for x, from that for the normed rows, or for x itself where there is no norm."""
    if norm is None or stats is None:
        return out.add_(grad)
    return norm.backward(grad, x, stats, out=out, accumulate=True)
