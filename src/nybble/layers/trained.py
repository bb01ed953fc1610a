"""Modules that are trained whole beside the adapters, as PEFT's `modules_to_save`: a new head, embeddings, norms.

A frozen module stays as it is, to ask the base; beside it lies a copy whose weights are fp32 masters, which compute in
the dtype that the model computes in.
"""

import copy
import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nybble.errors import ConfigError
from nybble.layers.dense import why_untouched
from nybble.layers.names import matches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TrainedModule(nn.Module):
    """A frozen module and the copy of it that is trained.

    Args:
        base: the frozen module, whose weights are all dense.
        compute_dtype: of inputs and weights while it computes; None takes that of the inputs, or, where these are no
            fractions (token ids), of the frozen weights.
    """

    def __init__(self, base: nn.Module, compute_dtype: torch.dtype | None = None):
        super().__init__()
        self.base, self.enabled, self._dtype = base, True, compute_dtype
        self.trained = copy.deepcopy(base).float().requires_grad_(True)

    @property
    def num_embeddings(self) -> int:
        """Of an embedding."""
        own: Any = self.base
        return int(own.num_embeddings)

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        if self._dtype is not None:
            inputs = tuple(_in_dtype(each, self._dtype) for each in inputs)
        if not self.enabled and self._dtype is None:
            return self.base(*inputs, **keywords)
        own = self.trained if self.enabled else self.base
        dtype = next((each.dtype for each in inputs if _is_fraction(each)), None) or self._base_dtype
        weights = {name: weight.to(dtype) for name, weight in own.named_parameters()}
        return functional_call(own, weights, inputs, keywords)

    @property
    def _base_dtype(self) -> torch.dtype:
        """What the frozen module computes in."""
        widened: torch.dtype | None = getattr(self.base, "compute_dtype", None)
        return widened or next(self.base.parameters()).dtype


def _is_fraction(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if _is_fraction(value) else value


def frozen(module: nn.Module) -> Any:
    """A module as it was before anything of it was trained whole."""
    return module.base if isinstance(module, TrainedModule) else module


def trained_modules(model: nn.Module) -> dict[str, TrainedModule]:
    """Every module of the model that is trained whole, by the name of the module it stands for."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TrainedModule)}


def train_modules(model: "PreTrainedModel", names: Iterable[str]) -> None:
    """Let the named modules be trained whole, in place, but for those that are already; heads compute in fp32."""
    known = trained_modules(model)
    for name in names:
        if name not in known:
            dtype = torch.float32 if is_score_head(model, name) else None
            model.set_submodule(name, TrainedModule(model.get_submodule(name), dtype))


def is_score_head(model: "PreTrainedModel", name: str) -> bool:
    """Whether a module makes scores of what the model beneath it says: it lies outside of that."""
    if model.get_output_embeddings() is not None or model.base_model is model:
        return False
    return not f"{name}.".startswith(f"{model.base_model_prefix}.")


def resolve_modules(
    model: "PreTrainedModel", wanted: Sequence[str], few_bits: Collection[str], adapted: Collection[str]
) -> list[str]:
    """Names of the modules that are trained whole.

    Args:
        model: loaded, or on the meta device; without adapters.
        wanted: the last parts of modules' names, dotted ends of them, or patterns, as `resolve_targets` takes them.
        few_bits: names of the linear layers that are, or will be, in few bits.
        adapted: names of the layers that get an adapter.

    Raises:
        ConfigError: a name matches no module with weights, or one whose weights are not its own, dense and free.
    """
    dense = {name: module for name, module in model.named_modules() if name and _has_weights(module)}
    chosen: dict[str, None] = {}
    for name in wanted:
        found = [module for module in dense if matches(module, name)]
        if not found:
            raise _unknown(name, list(dense))
        for module in found:
            _check_free(module, model, few_bits, adapted)
        chosen |= dict.fromkeys(found)
    inner = {name for name in chosen for outer in chosen if name.startswith(f"{outer}.")}
    return [name for name in dense if name in chosen and name not in inner]


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _check_free(module: str, model: "PreTrainedModel", few_bits: Collection[str], adapted: Collection[str]) -> None:
    tied = model.all_tied_weights_keys
    shared = {key.rpartition(".")[0] for key in (*tied, *tied.values())}
    reasons: list[tuple[Mapping[str, str], str]] = [
        (dict.fromkeys(few_bits, "is in few bits"), "Leave it out: it gets an adapter by --target-modules."),
        (dict.fromkeys(adapted, "gets an adapter"), "Leave it out of --target-modules or of --modules-to-save."),
        (
            dict.fromkeys(shared, "is embedding and head in one"),
            "Leave it out: PEFT would train one of the two and not the other.",
        ),
        (why_untouched(model), "Leave it out."),
    ]
    for why, fix in reasons:
        if inside := next((name for name in why if name == module or name.startswith(f"{module}.")), None):
            what = f"modules-to-save names {module!r}, " + ("which" if inside == module else f"of which {inside}")
            raise ConfigError(f"{what} {why[inside]}.", "Trained whole are modules whose weights are dense.", fix)


def _unknown(wanted: str, dense: Sequence[str]) -> ConfigError:
    leaves = sorted({name.rpartition(".")[2] for name in dense if not name.rpartition(".")[2].isdecimal()})
    near = difflib.get_close_matches(wanted, [*leaves, *dense], n=1)
    return ConfigError(
        f"modules-to-save names {wanted!r}, which is no module with weights of this model.",
        f"Allowed: names among {', '.join(leaves)}, longer ends of names, or a pattern.",
        f"Did you mean {near[0]!r}?" if near else "",
    )
