"""Which stored tensor belongs to which parameter of a model, checked before any of them is read."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nybble.errors import ModelError
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.formats.safetensors import tensor_sha256
from nybble.layers.convert import block_lists
from nybble.sources.checkpoint_names import COMPUTED
from nybble.sources.skeleton import is_encoder
from nybble.sources.task import HEADS, TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nybble.sources.stored_model import StoredModel

SHOWN = 5


@dataclass(frozen=True)
class PlacedTensor:
    """A stored tensor that is for a parameter.

    Args:
        name: in the source.
        shape: of the parameter.
    """

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Placed:
    """Where stored tensors go.

    Args:
        tensors: parameter -> the stored tensor for it, each once.
        fresh: parameters of a new head, for which nothing is stored.
        left_out: stored tensors of another head.
        computed: what is not stored, nor need be, since the model's own code fills it.
    """

    tensors: dict[str, PlacedTensor]
    fresh: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()


def place_tensors(source: "StoredModel", model: "PreTrainedModel") -> Placed:
    """What becomes of the stored tensors in `model`, whose linears have not been swapped yet.

    Checkpoints saved from the bare backbone lack its prefix ("model.", "transformer."), some have one too many.
    Of tied parameters the first is the target, whichever is stored. Where the model is not the one that its config asks
    for but one for another task, its head begins anew, and the stored one is left out; a stored head is taken where it
    has the parameters' shapes.

    Raises:
        ModelError: a stored tensor has no place, a parameter has no stored tensor, or tied parameters
            are stored with different values.
    """
    tied = model.all_tied_weights_keys  # {"lm_head.weight": "model.embed_tokens.weight"}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = f"{model.base_model_prefix}."
    placed: dict[str, PlacedTensor] = {}
    unused = []
    for name in source.tensor_names():
        found = next((key for key in (name, prefix + name, name.removeprefix(prefix)) if key in shapes), None)
        if found is None:
            if not COMPUTED.search(name):
                unused.append(name)
            continue
        target = tied.get(found, found)
        if target in placed:
            _check_same(source, placed[target].name, name)
        else:
            placed[target] = PlacedTensor(name, shapes[target])
    missing = sorted({tied.get(name, name) for name in shapes} - placed.keys())
    if not source.task.writes:
        return _with_new_head(source, model, placed, unused, missing)
    computed = _computed(model, missing) if source.task.prompted else []
    _check_all_used(source, model, unused, [name for name in missing if name not in computed])
    return Placed(placed, computed=tuple(computed))


def _computed(model: "PreTrainedModel", missing: list[str]) -> list[str]:
    """What of an encoder-decoder is no part of checkpoints, as its makers say."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return [name for name in missing if any(re.search(pattern, name) for pattern in patterns)]


def _with_new_head(
    source: "StoredModel",
    model: "PreTrainedModel",
    placed: dict[str, PlacedTensor],
    unused: list[str],
    missing: list[str],
) -> Placed:
    """The stored tensors and the parameters of the model that the head stands on must fit all the same, but for a
    pooler, which some checkpoints have and some lack.
    """
    prefix = f"{model.base_model_prefix}."
    lists = (f".{name.removeprefix(prefix)}." for name in block_lists(model))
    inner = [part for part in lists if any(part in f".{name}" for name in unused)]
    lost = [n for n in missing if (n.startswith(prefix) or model.base_model is model) and ".pooler." not in f".{n}"]
    _check_all_used(source, model, [name for name in unused if any(part in f".{name}" for part in inner)], lost)
    head = [name for name in placed if name.partition(".")[0] in HEADS]
    unfit = {name for name in head if not source.task.stored_head or not _has_shape(source, placed[name])}
    left_out = (*unused, *(placed[name].name for name in head if name in unfit))
    kept = {name: place for name, place in placed.items() if name not in unfit}
    return Placed(kept, (*missing, *(name for name in head if name in unfit)), left_out)


def _has_shape(source: "StoredModel", place: PlacedTensor) -> bool:
    return tuple(source.read(place.name).shape) == place.shape


def _check_all_used(source: "StoredModel", model: "PreTrainedModel", unused: list[str], missing: list[str]) -> None:
    if unused or missing:
        what = [f"{source.name} does not fit {type(model).__name__}, which its config asks for."]
        what += [f"Stored and not in the model: {_listed(unused)}."] if unused else []
        what += [f"In the model and not stored: {_listed(missing)}."] if missing else []
        raise ModelError(
            " ".join(what),
            "Every stored tensor must be used and every parameter must be stored.",
            "Check that config.json and the weights belong together and that no file is missing."
            + _tie_hint(model, missing)
            + _encoder_hint(source),
        )


def read_placed(source: "StoredModel", place: PlacedTensor) -> Tensor | QuantizedTensor:
    """The stored tensor, checked: the parameter's shape, finite values.

    Raises:
        ModelError: names the tensor that is otherwise.
    """
    tensor = source.read(place.name)
    # a four-bit weight is always [out, in], which GPT-2's layers store the other way round
    flipped = isinstance(tensor, QuantizedTensor) and tensor.shape == place.shape[::-1]
    check_stored(source, place.name, tensor, tensor.shape if flipped else place.shape)
    return tensor


def check_stored(source: "StoredModel", name: str, tensor: Tensor | QuantizedTensor, shape: tuple[int, ...]) -> None:
    """Refuse what a source has for a parameter, or for an expert of one, where it is not as it must be.

    Raises:
        ModelError: it has another shape, or holds values that are not finite.
    """
    check_shape(source, name, tuple(tensor.shape), shape)
    if isinstance(tensor, Tensor):
        _check_finite(source, name, tensor)


def check_shape(source: "StoredModel", name: str, stored: tuple[int, ...], asked: tuple[int, ...]) -> None:
    """The same of a tensor that is not read yet.

    Raises:
        ModelError: it has another shape.
    """
    if tuple(stored) != tuple(asked):
        raise ModelError(
            f"{source.name}: the tensor {name} has the shape {list(stored)}.",
            f"Its config asks for {list(asked)}.",
            "Check that config.json and the weights belong together.",
        )


def _tie_hint(model: "PreTrainedModel", missing: list[str]) -> str:
    """What to do about a model whose head is its embedding, but whose config does not say so."""
    only_head = all(model.get_submodule(name.rpartition(".")[0]) is model.get_output_embeddings() for name in missing)
    if not missing or not only_head:
        return ""
    return ' If its head is its embedding: set "tie_word_embeddings" to true in its config.json.'


def _encoder_hint(source: "StoredModel") -> str:
    """What an encoder can learn, where a language model was asked for."""
    if source.task is not TOKENS or not is_encoder(source.config):
        return ""
    return (
        " It is an encoder, which goes on with no text; to tell texts apart: --objective classify; to embed them: "
        "--objective embed."
    )


def _check_same(source: "StoredModel", first: str, second: str) -> None:
    tensors = (source.read(name) for name in (first, second))  # one of them in memory
    digests = {tensor_sha256(each.packed if isinstance(each, QuantizedTensor) else each) for each in tensors}
    if len(digests) > 1:
        raise ModelError(
            f"{source.name} holds different tensors for parameters that its config ties: {first} and {second}.",
            "Tied parameters are stored once, or alike.",
            'Set "tie_word_embeddings" to false in its config.json if they are meant to differ.',
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _check_finite(source: "StoredModel", name: str, tensor: Tensor) -> None:
    """One pass without temporaries: NaN and infinity both show in the extremes."""
    if tensor.is_floating_point() and not all(torch.isfinite(end) for end in torch.aminmax(tensor)):
        count = int((~torch.isfinite(tensor)).sum())
        raise ModelError(
            f"{source.name}: the tensor {name} holds {count} values that are not finite.",
            "Allowed: finite weights.",
            "Fetch the model again, or choose another: this one is damaged.",
        )
