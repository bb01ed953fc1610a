"""Which parameters of a model the stored tensors of a checkpoint become, by transformers' own conversion tables.

Checkpoints come under older names, an expert a tensor, nested in a vision-language model, or under the prefix of what
their model was wrapped in when it was saved (torch.compile, PEFT). transformers knows the names (its
`conversion_mapping`); what it does to whole state dicts when it loads is done here one parameter at a time.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nybble.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# stored by old versions of transformers, computed by new ones
COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\battn\.(masked_)?bias$|\battention\.(masked_)?bias$|\bposition_ids$")


@dataclass(frozen=True)
class Recipe:
    """How a parameter is made of stored tensors.

    Args:
        sources: names of stored tensors and the converter's pattern that each matched, in the order it takes them.
        converter: transformers' WeightConverter; None where the tensor is the parameter as it is stored.
        result: what the converter calls the parameter.
        model: on the meta device, which some converters look at.
    """

    sources: tuple[tuple[str, str], ...]
    converter: Any = field(default=None, repr=False)
    result: str = ""
    model: Any = field(default=None, repr=False)

    @property
    def plain_name(self) -> str | None:
        """The stored tensor that this parameter is, None where it is computed from several or in another shape."""
        return self.sources[0][0] if self.converter is None else None

    def make(self, read: Callable[[str], Tensor]) -> Tensor:
        """The parameter; `read` gives stored tensors, of which the converter drops each as soon as it can."""
        if self.converter is None:
            return read(self.sources[0][0])
        return _convert(self.converter, self.model, self.result, self.sources, read)[self.result]

    def make_part(
        self, index: int, shape: Callable[[str], tuple[int, ...]], read: Callable[[str, int | None], Tensor]
    ) -> Tensor:
        """The index-th of the parameter's first dimension, such as an expert, of no more than it is made of: of the
        index-th tensor where a pattern has one for each, of the index-th row of a single one.

        Args:
            shape: of a stored tensor.
            read: gives a stored tensor, or a row of it.
        """
        if self.converter is None:
            return read(self.sources[0][0], index)
        patterns = self._by_pattern()
        whole = {pattern: names[0] for pattern, names in patterns.items() if len(shape(names[0])) > 2}

        def part(name: str) -> Tensor:
            return read(name, index)[None] if name in whole.values() else read(name, None)

        chosen = [(whole.get(pattern) or names[index], pattern) for pattern, names in patterns.items()]
        return _convert(self.converter, self.model, self.result, chosen, part)[self.result][0]

    def num_parts(self, shape: Callable[[str], tuple[int, ...]]) -> int:
        """How many of these there are."""
        first = self.sources[0][0]
        if self.converter is None or len(shape(first)) > 2:
            return shape(first)[0]
        return min(map(len, self._by_pattern().values()))

    def _by_pattern(self) -> dict[str, list[str]]:
        """Stored tensors that a parameter is made of, by the converter's patterns."""
        found: dict[str, list[str]] = {}
        for name, pattern in self.sources:
            found.setdefault(pattern, []).append(name)
        return found


@dataclass(frozen=True)
class CheckpointNames:
    """The parameters that a checkpoint holds, under the names of the model that is trained.

    Args:
        recipes: by parameter; stored tensors that are nothing to the model stand under their own name.
        left_out: stored tensors of other parts of a larger model, such as a vision tower, in the order of the file.
        wrapper: a prefix that all stored names have and the model does not; "" without one.
    """

    recipes: Mapping[str, Recipe]
    left_out: tuple[str, ...] = ()
    wrapper: str = ""


def checkpoint_names(
    shapes: Mapping[str, tuple[int, ...]], model: "PreTrainedModel", whole: "PreTrainedModel | None" = None
) -> CheckpointNames:
    """What becomes of stored tensors in `model`.

    Args:
        shapes: of the stored tensors by name.
        model: that is trained, on the meta device.
        whole: the larger model that the checkpoint may hold and `model` is the text part of, on the meta device.

    Raises:
        ModelError: tensors do not have the shapes that transformers' converters need.
    """
    wrapper = _shared_parts(shapes)
    found: list[tuple[int, CheckpointNames]] = []
    for candidate in [model] if whole is None else [whole, model]:
        for length in range(len(wrapper) + 1):
            prefix = "".join(f"{part}." for part in wrapper[:length])
            recipes, unknown = _recipes(shapes, prefix, candidate)
            if recipes:
                found.append((len(unknown), _in_terms_of(model, candidate, recipes, unknown, prefix)))
            if recipes and not unknown:
                return found[-1][1]
    unfit = CheckpointNames({name: Recipe(((name, name),)) for name in shapes})
    return min(found, key=lambda each: each[0])[1] if found else unfit


def _shared_parts(names: Iterable[str]) -> list[str]:
    """The dotted parts that all names begin with, but not their last."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


def _recipes(
    shapes: Mapping[str, tuple[int, ...]], wrapper: str, model: "PreTrainedModel"
) -> tuple[dict[str, Recipe], list[str]]:
    """The model's parameters that are stored, and the stored tensors that are none."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = model.state_dict()
    recipes: dict[str, Recipe] = {}
    unknown = []
    groups: dict[str, list[tuple[str, str]]] = {}  # first parameter that a converter gives -> what it takes
    for name in sorted(shapes, key=dot_natural_key):
        key = name.removeprefix(wrapper)
        renamed, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if renamed not in known:  # it may be the model's own name already
            renamed, pattern = rename_source_key(key, [], [], model.base_model_prefix, known)
        if renamed not in known:
            unknown.append(name)
        elif pattern is not None:
            groups.setdefault(renamed, []).append((name, pattern))
        elif renamed in recipes:  # twice: placing compares them
            unknown.append(name)
        else:
            recipes[renamed] = Recipe(((name, name),))
    for first, sources in groups.items():
        converter = by_pattern[sources[0][1]]
        try:  # without values: memory is not what can fail
            made = _convert(converter, model, first, sources, lambda name: torch.empty(shapes[name], device="meta"))
        except (RuntimeError, ValueError, IndexError) as error:
            raise ModelError(
                f"{first} cannot be made of the {len(sources)} tensors stored for it: {error}",
                "transformers' conversion table for this model says which they are, and in what shapes.",
                "Check that config.json and the weights belong together and that no file is missing.",
            ) from error
        recipes |= {result: Recipe(tuple(sources), converter, result, model) for result in made}
    return recipes, unknown


def _convert(
    converter: Any,
    model: "PreTrainedModel",
    first: str,
    sources: Iterable[tuple[str, str]],
    read: Callable[[str], Tensor],
) -> dict[str, Tensor]:
    """All parameters that a converter makes of the stored tensors."""
    taken = deepcopy(converter)
    for name, pattern in sources:
        taken.add_tensor(first, name, pattern, lambda name=name: read(name))
    made = taken.convert(first, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _in_terms_of(
    model: "PreTrainedModel", candidate: "PreTrainedModel", recipes: dict[str, Recipe], unknown: list[str], wrapper: str
) -> CheckpointNames:
    """The same under the names of the text model; parameters of `candidate` that lie outside it are left out."""
    inner = {name: name for name in recipes} if candidate is model else _inner_names(candidate, model)
    own = {inner[name]: recipe for name, recipe in recipes.items() if name in inner}
    others = {source for name, recipe in recipes.items() if name not in inner for source, _ in recipe.sources}
    expected = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ()) or "$^")
    for name in unknown:
        if expected.search(name.removeprefix(wrapper)) and not COMPUTED.search(name):
            others.add(name)
        else:
            own[name] = Recipe(((name, name),))
    return CheckpointNames(own, tuple(sorted(others)), wrapper)


def _inner_names(whole: "PreTrainedModel", text: "PreTrainedModel") -> dict[str, str]:
    """Parameter of the larger model -> its name in the text model."""
    inner = next((module for module in whole.modules() if type(module) is type(text.base_model)), None)
    pairs = [(inner, text.base_model), (whole.get_output_embeddings(), text.get_output_embeddings())]
    return {
        f"{_path(whole, larger)}.{leaf}": f"{_path(text, own)}.{leaf}"
        for larger, own in pairs
        if larger is not None and own is not None
        for leaf in own.state_dict()
    }


def _path(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, each in model.named_modules() if each is module)
