"""Embedding and head kept in 16 bits while the model computes in another dtype.

They are the largest dense parts of a four-bit model: widening them to fp32 on machines without bf16
products would double what they take, so the few rows that are needed are widened instead.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nybble.layers.loss_head import PANEL_ROWS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CastEmbedding(nn.Embedding):
    """`nn.Embedding` that returns its rows in `compute_dtype`."""

    compute_dtype: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(self.compute_dtype)


class CastLinear(nn.Linear):
    """`nn.Linear` that widens its weight panel by panel to the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == self.weight.dtype:
            return super().forward(input)
        panels = [F.linear(input, panel.to(input.dtype)) for panel in self.weight.split(PANEL_ROWS)]
        y = torch.cat(panels, dim=-1)  # (..., out)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def replace_dense_ends(model: "PreTrainedModel", compute_dtype: torch.dtype) -> None:
    """Swap the input embeddings and the output head of a transformers model for casting ones, in place."""
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if module is embedding and type(module) is nn.Embedding:
            cast = CastEmbedding(
                module.num_embeddings, module.embedding_dim, module.padding_idx, _weight=module.weight, _freeze=True
            )
            cast.weight = module.weight
            cast.compute_dtype = compute_dtype
            model.set_submodule(name, cast)
        elif module is head and type(module) is nn.Linear:
            linear = CastLinear(module.in_features, module.out_features, module.bias is not None, device="meta")
            linear.weight, linear.bias = module.weight, module.bias
            model.set_submodule(name, linear)
