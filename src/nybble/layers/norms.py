"""Norms over transformers' modules, forward and backward, as decoder blocks compute them.

RMSNorm: arXiv 1910.07467.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nybble.families import FAMILIES
from nybble.families.family import Family
from nybble.kernels.ops.norm import rms_norm, rms_norm_backward

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Norm:
    """RMSNorm over a module's weight.

    Args:
        offset: added to the weight.
    """

    module: Any
    eps: float
    offset: float

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.module.weight
        return weight.detach()

    def forward(self, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The normed rows and 1 / RMS of each."""
        return rms_norm(x, self.weight, self.eps, self.offset, out=out)

    def backward(
        self, grad: Tensor, x: Tensor, rstd: Tensor, out: Tensor | None = None, accumulate: bool = False
    ) -> Tensor:
        return rms_norm_backward(grad, x, self.weight, rstd, self.offset, out=out, accumulate=accumulate)


@dataclass
class Normed:
    """What the backward of a norm needs."""

    norm: Norm
    before: Tensor  # (T, width) or (T, heads, head_dim)
    rstd: Tensor  # (T) or (T, heads)

    def backward(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        return self.norm.backward(grad, self.before, self.rstd, out=out)


def norm_over(module: Any, family: Family, config: Any) -> Norm:
    """The norm that a module of the family's models computes."""
    return Norm(module, config.rms_norm_eps, family.norm_offset)


def final_norm(model: "PreTrainedModel") -> Norm:
    """What comes between a model's last block and its head."""
    config = model.config.get_text_config()
    return norm_over(model.base_model.norm, FAMILIES[config.model_type], config)


def through_norm(norm: Norm | None, grad: Tensor, x: Tensor, rstd: Tensor | None, out: Tensor) -> Tensor:
    """Add to `out` the gradient for x, from that for the normed rows, or for x itself where there is no norm."""
    if norm is None or rstd is None:
        return out.add_(grad)
    return norm.backward(grad, x, rstd, out=out, accumulate=True)
