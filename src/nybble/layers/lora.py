"""LoRA: a trained low-rank correction beside a frozen linear layer.

Hu et al. 2021 (arXiv 2106.09685): y = W·x + (α / r) · B·A·x, with A ~ U(±1/√in) and B = 0, so that
training starts from the base. rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) scales by α / √r instead. DoRA (Liu et al.
2024, arXiv 2402.09353) trains the length of each row of the weight beside its direction.
A and B are fp32 masters; the products run in the dtype of x.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nybble.layers.dense import weight_matrix
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.layers.streamed import StreamedExperts, StreamedLinear, add_into

TINY = 1e-30  # a norm of zero is not divided by


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
        self.rank, self.alpha, self.rslora, self.dropout = rank, alpha, rslora, dropout
        self.scaling = lora_scaling(alpha, rank, rslora)
        device = base.device if isinstance(base, StreamedLinear | StreamedExperts) else next(base.parameters()).device
        a, b = self._drawn(generator)
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(b.to(device))
        self.initial: tuple[Tensor, Tensor] | None = None  # A and B that training began with, where B was not zero
        self.taken_by = ""  # what took them out of the weight before it was frozen, by PEFT's name: pissa or olora
        self.enabled = True
        self.tuned = True  # of what was taken out of the weight: A and B are those in training, not those it began with

    def _drawn(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        bound = 1 / math.sqrt(self.in_features)
        a = torch.empty(self.rank, self.in_features).uniform_(-bound, bound, generator=generator)
        return a, torch.zeros(self.out_features, self.rank)

    @property
    def weight(self) -> Tensor:
        """The frozen layer's, for models whose code asks it for its type."""
        base: Any = self.base
        weight: Tensor = base.weight
        return weight

    def start_from(self, a: Tensor, b: Tensor) -> None:
        """Begin with these A `(r, in)` and B `(out, r)` instead of with B = 0, and remember them."""
        with torch.no_grad():
            self.lora_A.copy_(a)
            self.lora_B.copy_(b)
        self.initial = (self.lora_A.detach().clone(), self.lora_B.detach().clone())

    def trained(self) -> tuple[Tensor, ...]:
        """What learns: A and B."""
        return self.lora_A, self.lora_B

    def row_scale(self) -> Tensor | None:
        """What each row of W + s·B·A is multiplied by, fp32 `(out)`; None: by nothing."""
        return None

    def forget(self) -> None:
        """Compute anew, at its next use, what was computed of A and B; nothing is."""

    def switch(self, enabled: bool) -> None:
        """On, or off to ask the base: with what was taken out of it back in, where something was."""
        if not self.taken_by:
            self.enabled = enabled
        elif self.tuned != enabled:
            self._exchange()
            self.tuned = enabled

    @torch.no_grad()
    def _exchange(self) -> None:
        """What A and B are, and what they began with."""
        assert self.initial is not None
        for parameter, other in zip((self.lora_A, self.lora_B), self.initial, strict=True):
            value = parameter.detach().clone()
            parameter.copy_(other)
            other.copy_(value)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.enabled:
            return y
        return add_into(y, F.linear(self.low_rank(x), self.lora_B.to(x.dtype)))  # (..., r) -> (..., out)

    def low_rank(self, x: Tensor) -> Tensor:
        """scaling · A·x, (..., in) -> (..., r); parts of x are dropped while training."""
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return F.linear(dropped, self.lora_A.to(x.dtype)) * self.scaling

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout}"


class DoraLinear(LoraLinear):
    """y = m / ‖W + s·B·A‖ · (W + s·B·A)·x + bias, with the norm of each row, and m of each row trained.

    As in the paper (section 4.3) and in PEFT no gradient goes through the norm. It is computed once for each value of A
    and B, without the sum of the matrices: ‖w‖² + 2·s·(w·Aᵀ)·b + s²·b·(A·Aᵀ)·b of each row w of W and b of B, where
    W·Aᵀ is what the frozen layer answers to the rows of A. There is no dropout.

    Args:
        base: with weights: their rows' norms are what m begins with.
    """

    magnitude: nn.Parameter

    def __init__(self, base: nn.Module, *arguments: Any, **keywords: Any):
        super().__init__(base, *arguments, **keywords)
        assert not self.dropout
        self._base_norms = row_norms(base)
        self._norms, self._versions = self._base_norms, (-1, -1)
        self.magnitude = nn.Parameter(self._base_norms.clone())

    def start_from(self, a: Tensor, b: Tensor) -> None:
        """As `LoraLinear` says; m begins with the norms of the sum."""
        super().start_from(a, b)
        with torch.no_grad():
            self.magnitude.copy_(self.norms())

    def trained(self) -> tuple[Tensor, ...]:
        """A, B and the magnitudes."""
        return *super().trained(), self.magnitude

    def row_scale(self) -> Tensor | None:
        """As `LoraLinear` says: m over the norms."""
        return self.magnitude.detach() / self.norms()

    def forget(self) -> None:
        """As `LoraLinear` says: the norms."""
        self._versions = (-1, -1)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """‖W + s·B·A‖ of each row, fp32 `(out)`."""
        versions = (self.lora_A._version, self.lora_B._version)
        if self._versions != versions:
            a, b = self.lora_A, self.lora_B
            base: Any = self.base
            answers = base(a.to(getattr(base, "compute_dtype", None) or base.weight.dtype))  # (r, out)
            along = answers.float() if base.bias is None else (answers - base.bias).float()
            squares = self._base_norms.square() + 2 * self.scaling * (along.T * b).sum(1)
            squares += self.scaling**2 * ((b @ (a @ a.T)) * b).sum(1)
            self._norms, self._versions = squares.clamp_(min=TINY).sqrt_(), versions
        return self._norms

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.enabled:
            return y
        bias: Any = self.base.bias
        turned = (y if bias is None else y - bias) + F.linear(self.low_rank(x), self.lora_B.to(x.dtype))
        scaled = turned * (self.magnitude / self.norms()).to(x.dtype)
        return scaled if bias is None else scaled + bias


def row_norms(linear: Any) -> Tensor:
    """Of the weight of a frozen linear layer, fp32 `(out)`."""
    weight = linear.dequantize() if isinstance(linear, QuantizedLinear) else weight_matrix(linear)
    return torch.linalg.vector_norm(weight.detach(), dim=1, dtype=torch.float32)


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
