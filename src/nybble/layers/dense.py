"""Embedding and head kept in 16 bits while the model computes in another dtype.

They are the largest dense parts of a four-bit model: widening them to fp32 on machines without bf16
products would double what they take, so the few rows that are needed are widened instead.
"""

import copy
import functools
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nybble.errors import ModelError
from nybble.layers.recurrence import steering_linears
from nybble.layers.streamed import embed_rows, panel_product
from nybble.layers.weight_reads import weights_read

if TYPE_CHECKING:
    from transformers import PreTrainedModel


STEERS = "it steers what a state forgets and takes in"


def is_transposed(module: nn.Module) -> bool:
    """Whether the module keeps its weight as [in, out] (GPT-2's Conv1D) and not as [out, in]."""
    return isinstance(module, Conv1D)


def kept_in_fp32(model: nn.Module) -> set[str]:
    """Names of the parameters and buffers that a model's makers keep in fp32 where the rest is in 16 bits, such as the
    bias that a router chooses experts with. As transformers' `from_pretrained` reads the list in the model's class.
    """
    listed = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    patterns = [re.compile(name.replace("*", ".*")) for name in listed]
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name for name, _ in tensors if any(pattern.search(name) for pattern in patterns)}


def why_untouched(model: nn.Module) -> dict[str, str]:
    """Modules, linear layers or not, whose weights stay as they are -> why."""
    why = dict.fromkeys(steering_linears(model), STEERS)
    read = weights_read(model, values=True)
    why |= {name: f"{where} reads its weight instead of calling it" for name, where in read.items()}
    return why | {name.removesuffix(".weight"): "its makers keep it in fp32" for name in kept_in_fp32(model)}


def weight_matrix(linear: Any) -> Tensor:
    """The weight of a dense linear layer, `[out, in]`."""
    weight: Tensor = linear.weight.detach()
    return weight.T if is_transposed(linear) else weight


class CastEmbedding(nn.Embedding):
    """Mixed in before an embedding's own class: its rows are widened to `compute_dtype`, then its own forward runs.

    What that does to rows (Gemma scales them) so happens in the dtype that the rest of the model computes in.
    """

    compute_dtype: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        rows = F.embedding(input.flatten(), self.weight).to(self.compute_dtype)  # (N, hidden)
        own_class = type(self).__mro__[2]
        return embed_rows(own_class, self, rows, input.shape)


@functools.cache
def _casting(own_class: type[nn.Embedding]) -> type[CastEmbedding]:
    return type(f"Cast{own_class.__name__}", (CastEmbedding, own_class), {})


class CastLinear(nn.Linear):
    """`nn.Linear` that widens its weight panel by panel to the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == self.weight.dtype:
            return super().forward(input)
        y = panel_product(input, self.weight.detach())  # (..., out)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model of transformers reads prompts by an encoder and writes answers by a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def input_embedding(model: Any) -> Any:
    """What makes states of tokens or pictures, of a model of transformers or of a part of one.

    Raises:
        ModelError: none is known.
    """
    found = known_embedding(model)
    if found is None:
        raise ModelError(
            f"{type(model).__name__} has no embedding of tokens, and no convolution over pictures, that is known.",
            "Allowed: models of transformers that have either.",
            "Choose another model.",
        )
    return found


def known_embedding(model: Any) -> Any:
    """The same by transformers' own lookup; where that knows none, the table of tokens of its usual name, or a vision
    model's first convolution; else None.
    """
    found, look_up = None, getattr(model, "get_input_embeddings", None)
    if look_up is not None:
        with suppress(NotImplementedError):
            found = look_up()
    found = getattr(model, "embed_tokens", None) if found is None else found
    if found is None and getattr(model, "main_input_name", "") == "pixel_values":
        found = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return found


def ends_of(model: "PreTrainedModel") -> dict[str, nn.Module]:
    """Input embeddings and output head by name; of an encoder-decoder, whose parts have embeddings of their own, all
    that share a weight with these.
    """
    whole = (known_embedding(model), model.get_output_embeddings())
    weights = {id(weight) for end in whole if end is not None for weight in end.parameters(recurse=False)}
    shared = is_encoder_decoder(model)
    return {
        name: module
        for name, module in model.named_modules()
        if any(module is end for end in whole)
        or (shared and any(id(weight) in weights for weight in module.parameters(recurse=False)))
    }


def narrow_ends(model: "PreTrainedModel") -> dict[str, nn.Module]:
    """Input embeddings and output head by name, where both may stay in 16 bits in a model that computes in 32; else
    none: an end is neither an embedding nor an `nn.Linear`, or its weight is read elsewhere, and the model's own code
    would meet two dtypes.
    """
    ends = ends_of(model)
    known = all(isinstance(end, nn.Embedding) or type(end) is nn.Linear for end in ends.values())
    return {} if not known or ends.keys() & weights_read(model).keys() else ends


def replace_dense_ends(model: "PreTrainedModel", compute_dtype: torch.dtype) -> set[str]:
    """Swap the input embeddings and the output head of a transformers model for casting ones, in place.

    Returns:
        names of their weights, which may now stay in 16 bits; none where `narrow_ends` finds none.
    """
    ends = narrow_ends(model)
    for name, end in ends.items():
        model.set_submodule(name, _cast(end, compute_dtype))
    return {f"{name}.weight" for name in ends}


def _cast(end: nn.Module, compute_dtype: torch.dtype) -> Any:
    if isinstance(end, nn.Embedding):
        own_class: Any = type(end)
        embedding: Any = copy.copy(end)
        embedding.__class__ = _casting(own_class)
        embedding.compute_dtype = compute_dtype
        return embedding
    assert isinstance(end, nn.Linear)
    linear = CastLinear(end.in_features, end.out_features, end.bias is not None, device="meta")
    linear.weight, linear.bias = end.weight, end.bias
    return linear
