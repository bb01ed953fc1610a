"""LoRA on every expert of a mixture: an A and a B for each, beside one projection of all experts."""

import math
from typing import Any

import torch
from torch import Tensor

from nybble.layers.expert_products import ExpertMatrices, ExpertsProduct
from nybble.layers.lora import LoraLinear


class LoraExperts(LoraLinear):
    """One projection of all experts and an adapter of each: A `[E, r, in]`, B `[E, out, r]`.

    Begins and is scaled as `LoraLinear`; there is no dropout, as PEFT has none on parameters.

    Args:
        base: the frozen matrices.
    """

    base: ExpertMatrices

    def _drawn(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        bound, num = 1 / math.sqrt(self.in_features), self.base.num_experts
        a = torch.empty(num, self.rank, self.in_features).uniform_(-bound, bound, generator=generator)
        return a, torch.zeros(num, self.out_features, self.rank)

    @property
    def num_experts(self) -> int:
        return self.base.num_experts

    def forward(self, routed: Any) -> Tensor:
        """(rows, in) -> (rows, out) of a `Routed`; zeros for rows of no expert."""
        if not self.enabled:
            y: Tensor = self.base(routed)
            return y
        y = ExpertsProduct.apply(routed.x, routed.counts, self.base, self.lora_A, self.lora_B, self.scaling)
        return y
