"""Full fine-tuning: every weight of a model is trained.

Weights are fp32 masters, which the optimizer updates. Where products run in 16 bits, a module that reads its weight
gets it rounded (`torch.nn.utils.parametrize`), and the gradient comes back to the master: what adapters do with A and
B, for any module of transformers. A step is often smaller than half the distance of two 16-bit values, and would be
rounded away (Micikevicius et al. 2017, arXiv 1710.03740, section 3.1).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nybble.layers.convert import adapters_of, block_linears
from nybble.layers.dense import kept_in_fp32
from nybble.layers.trained import trained_modules

_MASTER = ".parametrizations."


class Rounded(nn.Module):
    """A master as its module reads it."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)


def train_weights(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Make every parameter of a model in fp32 trained, in place; its products run in `compute_dtype`."""
    model.requires_grad_(True)
    if compute_dtype == torch.float32:
        return
    wide = kept_in_fp32(model)
    for name, module in list(model.named_modules()):
        for leaf in [leaf for leaf, _ in module.named_parameters(recurse=False)]:
            if f"{name}.{leaf}" not in wide:
                parametrize.register_parametrization(module, leaf, Rounded(compute_dtype), unsafe=True)


def weights_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter, the master where its module reads it rounded, by the name that the model's makers gave it."""
    named = model.named_parameters()
    return {name.replace(_MASTER, ".").removesuffix(".original") if _MASTER in name else name: p for name, p in named}


def master_of(module: Any, leaf: str = "weight") -> Any:
    """A module's parameter, the master where it reads that rounded."""
    if parametrize.is_parametrized(module, leaf):
        return getattr(module.parametrizations, leaf).original
    return getattr(module, leaf)


def trains_weights(model: nn.Module) -> bool:
    """Whether the linear layers of the blocks are trained themselves, and nothing beside them."""
    if adapters_of(model) or trained_modules(model):
        return False
    linears = (model.get_submodule(name) for name in block_linears(model))
    return any(parameter.requires_grad for linear in linears for parameter in linear.parameters())
