"""Which stored tensor belongs to which parameter of a model, checked before any of them is read."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nybble.errors import ModelError
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.models.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# stored by old versions of transformers, computed by new ones
HARMLESS = (r"rotary_emb\.inv_freq$", r"\battn\.(masked_)?bias$", r"\battention\.(masked_)?bias$", r"\bposition_ids$")
SHOWN = 5


def place_tensors(source: ModelSource, model: "PreTrainedModel") -> dict[str, str]:
    """Name in the source -> name of the parameter in `model`; of tied parameters, always the first.

    Checkpoints saved from the bare backbone lack its prefix ("model.", "transformer."), some have one too many.

    Raises:
        ModelError: a stored tensor has no place, or a parameter has no stored tensor.
    """
    tied = model.all_tied_weights_keys  # {"lm_head.weight": "model.embed_tokens.weight"}
    known = model.state_dict().keys()
    prefix = f"{model.base_model_prefix}."
    ignored = re.compile("|".join((*HARMLESS, *(model._keys_to_ignore_on_load_unexpected or ()))))
    placed, unused = {}, []
    for name in source.tensor_names():
        target = next((key for key in (name, prefix + name, name.removeprefix(prefix)) if key in known), None)
        if target is not None:
            placed[name] = tied.get(target, target)
        elif not ignored.search(name):
            unused.append(name)
    missing = sorted({tied.get(name, name) for name in known} - set(placed.values()))
    if unused or missing:
        kind = type(model).__name__
        found = [f"{source.name} does not fit {kind}, which its config asks for."]
        found += [f"Stored and not in the model: {_listed(unused)}."] if unused else []
        found += [f"In the model and not stored: {_listed(missing)}."] if missing else []
        raise ModelError(
            " ".join(found),
            "Every stored tensor must be used and every parameter must be stored.",
            "Check that config.json and the weights belong together and that no file is missing.",
        )
    return placed


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every stored parameter and buffer, to be taken before linears are swapped."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def placed_tensors(
    source: ModelSource, placed: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
    """The source's tensors under their names in the model, each once, with its shape and values checked.

    Args:
        placed: from `place_tensors`.
        shapes: that the model has, by name.

    Raises:
        ModelError: a shape that the model does not have, a value that is not finite, or two different
            tensors for tied parameters.
    """
    copies = Counter(placed.values())
    digests: dict[str, str] = {}
    for name, tensor in source.tensors():
        target = placed.get(name)
        if target is None:
            continue
        _check_shape(source, name, tuple(tensor.shape), shapes[target])
        if isinstance(tensor, Tensor):
            _check_finite(source, name, tensor)
        if copies[target] > 1:
            digest = _digest(tensor)
            first = target not in digests
            if digests.setdefault(target, digest) != digest:
                raise ModelError(
                    f"{source.name} holds different tensors for parameters that its config ties, among them {name}.",
                    "Tied parameters are stored once, or alike.",
                    'Set "tie_word_embeddings" to false in its config.json if they are meant to differ.',
                )
            if not first:
                continue
        yield target, tensor


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _check_shape(source: ModelSource, name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    # a four-bit weight is always [out, in], which GPT-2's layers store the other way round
    if got != expected and not (source.is_quantized(name) and got == expected[::-1]):
        raise ModelError(
            f"{source.name}: the tensor {name} has the shape {list(got)}.",
            f"Its config asks for {list(expected)}.",
            "Check that config.json and the weights belong together.",
        )


def _check_finite(source: ModelSource, name: str, tensor: Tensor) -> None:
    """One pass without temporaries: NaN and infinity both show in the extremes."""
    if tensor.is_floating_point() and not all(torch.isfinite(end) for end in torch.aminmax(tensor)):
        count = int((~torch.isfinite(tensor)).sum())
        raise ModelError(
            f"{source.name}: the tensor {name} holds {count} values that are not finite.",
            "Allowed: finite weights.",
            "Fetch the model again, or choose another: this one is damaged.",
        )


def _digest(tensor: Tensor | QuantizedTensor) -> str:
    stored = tensor.packed if isinstance(tensor, QuantizedTensor) else tensor
    return hashlib.sha256(stored.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
