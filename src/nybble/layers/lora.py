"""LoRA: a trained low-rank correction beside a frozen linear layer.

Hu et al. 2021 (arXiv 2106.09685): y = W·x + (α / r) · B·A·x, with A ~ U(±1/√in) and B = 0, so that
training starts from the base. rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) scales by α / √r instead.
A and B are fp32 masters; the products run in the dtype of x.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nybble.layers.streamed import StreamedLinear


def lora_scaling(alpha: float, rank: int, rslora: bool) -> float:
    """The factor before B·A·x."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter.

    Args:
        base: the frozen layer: QuantizedLinear, or a dense linear for 16-bit LoRA.
        rank: r, rows of A `[r, in]` and columns of B `[out, r]`.
        alpha: numerator of the scaling.
        dropout: probability with which an input element of A is dropped while training.
        rslora: scale by alpha/√rank instead of alpha/rank.
        generator: draws A; CPU, so that every device starts from the same adapter.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = linear_features(base)
        self.rank, self.dropout = rank, dropout
        self.scaling = lora_scaling(alpha, rank, rslora)
        device = base.device if isinstance(base, StreamedLinear) else next(base.parameters()).device
        a, b = self._drawn(generator)
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(b.to(device))
        self.initial: tuple[Tensor, Tensor] | None = None  # A and B that training began with, where B was not zero
        self.enabled = True

    def _drawn(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        bound = 1 / math.sqrt(self.in_features)
        a = torch.empty(self.rank, self.in_features).uniform_(-bound, bound, generator=generator)
        return a, torch.zeros(self.out_features, self.rank)

    def start_from(self, a: Tensor, b: Tensor) -> None:
        """Begin with these A `(r, in)` and B `(out, r)` instead of with B = 0, and remember them."""
        with torch.no_grad():
            self.lora_A.copy_(a)
            self.lora_B.copy_(b)
        self.initial = (self.lora_A.detach().clone(), self.lora_B.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.enabled:
            return y
        return y + F.linear(self.low_rank(x), self.lora_B.to(x.dtype))  # (..., r) -> (..., out)

    def low_rank(self, x: Tensor) -> Tensor:
        """scaling · A·x, (..., in) -> (..., r); parts of x are dropped while training."""
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return F.linear(dropped, self.lora_A.to(x.dtype)) * self.scaling

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout}"


class LoraEmbedding(LoraLinear):
    """A frozen embedding and its adapter: a token's row gets scaling · B · (its column of A).

    As in PEFT: A `[r, vocabulary]` begins with zeros, B `[width, r]` ~ N(0, 1), and dropout has no part in it. Where
    the embedding scales its rows (Gemma), the correction is scaled alike.
    """

    base: nn.Embedding

    def _drawn(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        b = torch.empty(self.out_features, self.rank).normal_(generator=generator)
        return torch.zeros(self.rank, self.in_features), b

    @property
    def num_embeddings(self) -> int:
        return self.in_features

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.enabled:
            return y
        low_rank = F.embedding(x, self.lora_A.T, self.base.padding_idx) * self.scaling  # (...) -> (..., r)
        added = F.linear(low_rank, self.lora_B)  # (..., r) -> (..., width)
        return y + (added * getattr(self.base, "embed_scale", 1.0)).to(y.dtype)


def linear_features(module: Any) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer, transformers' transposed `Conv1D` included, or of an embedding."""
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)
    rows, columns = module.weight.shape  # Conv1D keeps [in, out], an embedding [vocabulary, width]
    return int(rows), int(columns)
