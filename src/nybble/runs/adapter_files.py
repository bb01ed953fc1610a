"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Key of a tensor: `base_model.model.<layer>.lora_A.weight` `[r, in]` and `.lora_B.weight` `[out, r]`, fp32; of an
embedding `.lora_embedding_A` `[r, vocabulary]` and `.lora_embedding_B` `[width, r]`. Of experts, which PEFT takes as
parameters (`target_parameters`), `[E r, in]`, an expert's rows together, and `[out, r E]`, an expert's columns E apart,
under the module that has them, `.base_layer` behind its name once for each later projection of it that is adapted.
DoRA's `.lora_magnitude_vector`
`[out]`; of tokens with rows of their own `.token_adapter.trainable_tokens_delta` `[tokens, width]`, these rows; of
modules that are trained whole (`modules_to_save`) their weights, as the module calls them.
Adapters that began with something other than B = 0 have a third file, `initial.safetensors`, with the same keys: what
they began with. PEFT does not look at it: on the quantised base the adapter is whole without it. Where that was taken
out of the base's weights (`init_lora_weights` is pissa or olora), PEFT takes it out of the base again when it loads
the adapter; for others there is the plain adapter of twice the rank, B A - B₀ A₀, which belongs on the base as it was.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nybble.errors import ModelError, RunError
from nybble.formats.safetensors import SafetensorsFolder, sampled_sha256
from nybble.layers.convert import (
    adapted_by_others,
    adapters_of,
    attach_adapters,
    end_modules,
    of_pattern,
    quantizable_linears,
)
from nybble.layers.lora import DoraLinear, LoraLinear, lora_scaling
from nybble.layers.lora_experts import LoraExperts
from nybble.layers.quantized_experts import expert_shapes
from nybble.layers.token_rows import token_rows, train_rows
from nybble.layers.trained import TrainedModule, train_modules, trained_modules
from nybble.options.adapter_groups import TAKES_FROM_BASE
from nybble.runs.expert_keys import expert_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
INITIAL_NAME = "initial.safetensors"
PREFIX = "base_model.model."
LINEAR, EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
TOKENS = ".token_adapter.trainable_tokens_delta"
MAGNITUDE = ".lora_magnitude_vector"
_BASE_WEIGHT = ".base_layer.weight"  # PEFT stores the frozen weight of an adapted embedding or head too
_KEY = re.compile(rf"{re.escape(PREFIX)}(?P<layer>.+)\.({'|'.join(map(re.escape, LINEAR + EMBEDDING))})")

# What a config may say without changing what the adapter computes; anything else must be off.
PLAIN_KEYS = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "use_rslora"),
    *("use_dora", "trainable_token_indices", "modules_to_save"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "inference_mode"),
    *("auto_mapping", "peft_version", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config"),
    *("rank_pattern", "alpha_pattern"),
    *("lora_ga_config", "runtime_config", "ensure_weight_tying", "qalora_group_size", "init_lora_weights"),
}
OFF: tuple[object, ...] = (None, False, "none", [], {}, 0)
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")  # ways to begin that leave the base with other weights


def _adaptable(model: nn.Module) -> list[str]:
    """Names of all layers that can have an adapter, or have one."""
    linears = {*quantizable_linears(model), *adapted_by_others(model)}
    return sorted({*linears, *expert_shapes(model), *end_modules(model), *adapters_of(model)})


class StoredAdapter:
    """An adapter folder, checked, whose matrices are read one layer at a time.

    Attributes:
        config: of PEFT.
        names: of the adapted layers.
        modules: names of the modules that were trained whole -> those of their weights.
        taken_by: "pissa" or "olora" where the frozen weights are less what the adapter began with.

    Args:
        on_original: give such an adapter as the plain one of twice the rank that belongs on the base as it was.

    Raises:
        RunError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, on_original: bool = False):
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise RunError(f"{folder} has no {name}.", "An adapter folder holds both.", "Check the path.")
        self.folder = folder
        try:
            self.config: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text())
            self.settings = _settings(self.config)
            lora_scaling(self.settings["alpha"], self.settings["rank"], self.settings["rslora"])
            self._stored = SafetensorsFolder(folder / WEIGHTS_NAME)
            begun = folder / INITIAL_NAME
            self._initial = SafetensorsFolder(begun) if begun.is_file() else None
        except (ModelError, ValueError, ArithmeticError, RecursionError, KeyError, TypeError) as error:
            raise RunError(f"The adapter in {folder} is damaged: {error}.", "", "Use an earlier checkpoint.") from error
        begun_as = self.config.get("init_lora_weights")
        self.taken_by: str = begun_as if self._initial is not None and begun_as in TAKES_FROM_BASE else ""
        self.doubled = on_original and bool(self.taken_by)
        self.modules = _modules(self.config, self._stored.entries)
        whole = {PREFIX + name + "." + leaf for name, leaves in self.modules.items() for leaf in leaves}
        if (said := self.config.get("modules_to_save")) and not self.modules:
            raise RunError(
                f"The adapter in {folder} has no weights of what its modules_to_save says: {said}.",
                "Allowed: an adapter with the weights of modules that were trained whole.",
            )
        _check_plain(folder, self.config, [key for key in self._stored.entries if key not in whole], self.taken_by)
        self.dora: bool = self.settings["dora"]
        stored = sorted({match["layer"] for key in self._stored.entries if (match := _KEY.fullmatch(key))})
        self._stored_as = expert_keys(self.config.get("target_parameters") or (), stored)
        hidden = set(self._stored_as.values())
        self.names = sorted([*self._stored_as, *(name for name in stored if name not in hidden)])
        self._check_ranks()
        self.tokens = self._tokens()

    def _tokens(self) -> dict[str, list[int]]:
        """Modules with rows that were trained -> of which tokens."""
        said = self.config.get("trainable_token_indices") or {}
        names = [key.removeprefix(PREFIX).removesuffix(TOKENS) for key in self._stored.entries if key.endswith(TOKENS)]
        by_leaf = said if isinstance(said, dict) else {"embed_tokens": said}
        found = {n: ids for n in names for leaf, ids in by_leaf.items() if n == leaf or n.endswith(f".{leaf}")}
        whole = all(isinstance(ids, list) and ids and all(type(id) is int for id in ids) for ids in found.values())
        if not whole or len(found) != len(names) or (by_leaf and not found):
            raise RunError(
                f"The adapter in {self.folder} has trained rows in {names}, its {CONFIG_NAME} says {said!r}.",
                "Allowed: rows of the embedding and of the head, each with its tokens.",
            )
        return found

    def says_rows_of(self, name: str) -> bool:
        """Whether rows of this module were trained, as the config says."""
        said = self.config.get("trainable_token_indices") or {}
        return isinstance(said, dict) and any(f".{name}".endswith(f".{leaf}") for leaf in said)

    def token_rows(self, name: str, width: int) -> Tensor:
        """The trained rows of one module, fp32 `[tokens, width]`.

        Raises:
            RunError: as `matrices`.
        """
        shape = (len(self.tokens[name]), width)
        return self._tensor(self._stored, WEIGHTS_NAME, PREFIX + name + TOKENS, shape)

    def module_weights(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        """All weights of a module that was trained whole by their names in it, fp32.

        Args:
            module: of that name in the base; on the meta device is enough.

        Raises:
            RunError: as `matrices`, or they are others than the base's.
        """
        shapes = {leaf: tuple(weight.shape) for leaf, weight in module.named_parameters()}
        if shapes.keys() != set(self.modules[name]):
            raise RunError(
                f"The adapter in {self.folder} has {', '.join(self.modules[name])} of {name}, this base has "
                f"{', '.join(shapes) or 'nothing'} of it.",
                "Allowed: an adapter trained on the same base.",
            )
        read = partial(self._tensor, self._stored, WEIGHTS_NAME)
        return {leaf: read(f"{PREFIX}{name}.{leaf}", shape) for leaf, shape in shapes.items()}

    def leaves(self, name: str) -> tuple[str, str]:
        """How the keys of one layer's A and B end."""
        return EMBEDDING if f"{PREFIX}{name}.{EMBEDDING[0]}" in self._stored.entries else LINEAR

    @property
    def experts(self) -> set[str]:
        """Those of the adapted layers that are projections of experts."""
        return set(self._stored_as)

    def stored_as(self, name: str) -> str:
        """The module that PEFT has one layer's matrices in."""
        return self._stored_as.get(name, name)

    def _keys(self, name: str) -> tuple[str, str]:
        """Of one layer's A and B."""
        first, second = (f"{PREFIX}{self.stored_as(name)}.{leaf}" for leaf in self.leaves(name))
        return first, second

    def _check_ranks(self) -> None:
        """Before anything is made of the ranks that the config says."""
        for name in self.names or [""]:
            first = self._stored.entries.get(self._keys(name)[0])
            rank = first.shape[0] if first is not None and len(first.shape) == 2 else None
            said = self._own_rank(name)
            if rank is not None and name in self.experts and rank % said == 0:
                continue  # of each of as many experts as the base has
            if rank != said:
                raise RunError(f"The adapter in {self.folder} has the rank {rank}, its {CONFIG_NAME} says {said!r}.")

    def _own_rank(self, layer: str) -> int:
        return of_pattern(self.settings["rank_pattern"], layer, self.settings["rank"])

    def rank_of(self, layer: str) -> int:
        """The rank of one layer's adapter."""
        return self._own_rank(layer) * (2 if self.doubled else 1)

    def scaling_of(self, layer: str) -> float:
        """What the product B A of one layer is multiplied by."""
        alpha = of_pattern(self.settings["alpha_pattern"], layer, self.settings["alpha"])
        return lora_scaling(alpha, self._own_rank(layer), self.settings["rslora"])

    @property
    def has_initial(self) -> bool:
        """Whether it began with something other than B = 0."""
        return self._initial is not None

    def features(self, layer: str) -> tuple[int, int]:
        """What one layer takes and gives, as its matrices say."""
        key_a, key_b = self._keys(layer)
        a, b = (self._stored.entries.get(key) for key in (key_a, key_b))
        if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
            raise RunError(f"The adapter in {self.folder} has not two matrices for {layer}.")
        return a.shape[1], b.shape[0]

    def fingerprint(self) -> str:
        """SHA-256 over every matrix's name and shape, and samples of its bytes."""
        return sampled_sha256(self._stored.entries.values())

    def scalings(self) -> str:
        """The layers' scalings as text, short where all have the same."""
        scalings = {name: self.scaling_of(name) for name in self.names}
        return str(next(iter(scalings.values()))) if len(set(scalings.values())) == 1 else json.dumps(scalings)

    def check_layers(self, model: nn.Module) -> None:
        """Refuse a model (on the meta device is enough) that lacks a layer of this adapter.

        Raises:
            RunError: names the layer.
        """
        layers, modules = set(_adaptable(model)), {name for name, _ in model.named_modules()}
        unknown = [name for name in self.names if name not in layers]
        if unknown := [*unknown, *(name for name in self.modules if name not in modules)]:
            raise RunError(
                f"The adapter in {self.folder} is for layer {unknown[0]!r}, which this base does not have.",
                "Allowed: an adapter trained on the same base.",
            )

    def matrices(self, name: str, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
        """A `[r, in]` and B `[out, r]` of one layer, in fp32.

        Raises:
            RunError: a matrix is missing, of another shape, or not finite.
        """
        a, b = self._pair(self._stored, WEIGHTS_NAME, name, in_features, out_features)
        if not self.doubled:
            return a, b
        begun = self.initial(name, in_features, out_features)
        assert begun is not None
        return torch.cat([a, begun[0]]), torch.cat([b, -begun[1]], dim=1)

    def expert_matrices(
        self, name: str, num: int, in_features: int, out_features: int, turned: bool = False
    ) -> tuple[Tensor, Tensor]:
        """A `[E, r, in]` and B `[E, out, r]` of one projection of experts, in fp32.

        Args:
            turned: PEFT has them of the transposed matrices.

        Raises:
            RunError: as `matrices`.
        """
        if turned:
            b, a = self.expert_matrices(name, num, out_features, in_features)
            return a.mT, b.mT
        key_a, key_b = self._keys(name)
        rank = self._own_rank(name)
        a = self._tensor(self._stored, WEIGHTS_NAME, key_a, (rank * num, in_features))
        b = self._tensor(self._stored, WEIGHTS_NAME, key_b, (out_features, rank * num))
        return a.view(num, rank, in_features), b.view(out_features, rank, num).permute(2, 0, 1)

    def initial(self, name: str, in_features: int, out_features: int) -> tuple[Tensor, Tensor] | None:
        """A and B that one layer's adapter began with; None where B was 0.

        Raises:
            RunError: as `matrices`.
        """
        if self._initial is None:
            return None
        return self._pair(self._initial, INITIAL_NAME, name, in_features, out_features)

    def magnitude(self, name: str, out_features: int) -> Tensor:
        """DoRA's length of each row of one layer's weight, fp32 `[out]`.

        Raises:
            RunError: as `matrices`.
        """
        return self._tensor(self._stored, WEIGHTS_NAME, PREFIX + name + MAGNITUDE, (out_features,))

    def check_base(self, name: str, weight: Tensor) -> None:
        """Refuse a base whose weight of one layer is not the one that PEFT stored beside the adapter.

        Raises:
            RunError: it is another, as after tokens were added to it.
        """
        key = f"{PREFIX}{name}{_BASE_WEIGHT}"
        if key in self._stored.entries and not torch.equal(self._stored.read(key).to(weight), weight):
            raise RunError(
                f"The adapter in {self.folder} was trained beside another {name}.weight than this base has.",
                "Allowed: the base it was trained on; the weights of an adapter's own embedding or head are not taken.",
                "Merge it into its base with PEFT (merge_and_unload), and use the merged model.",
            )

    def _pair(
        self, stored: SafetensorsFolder, file: str, name: str, in_features: int, out_features: int
    ) -> tuple[Tensor, Tensor]:
        key_a, key_b = self._keys(name)
        rank = self._own_rank(name)
        a = self._tensor(stored, file, key_a, (rank, in_features))
        return a, self._tensor(stored, file, key_b, (out_features, rank))

    def _tensor(self, stored: SafetensorsFolder, file: str, key: str, shape: tuple[int, ...]) -> Tensor:
        entry = stored.entries.get(key)
        where = f"{self.folder / file}: {key}"
        if entry is None or entry.shape != shape:
            found = "nothing" if entry is None else f"shape {entry.shape}"
            raise RunError(
                f"{where} should have shape {shape}; found {found}.", "Allowed: an adapter trained on the same base."
            )
        matrix = stored.read(key).float()
        if not bool(matrix.isfinite().all()):
            raise RunError(f"{where} holds values that are not finite.", "", "Use an earlier checkpoint.")
        return matrix


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """How adapters are made (`attach_adapters`), as PEFT's config says it.

    Raises:
        ValueError, KeyError, TypeError: it does not.
    """
    if not isinstance(config, dict):
        raise TypeError(f"{CONFIG_NAME} is no object")
    patterns: dict[str, dict[str, Any]] = {}
    for key in ("rank_pattern", "alpha_pattern"):
        patterns[key] = dict(config.get(key) or {})
        for expression in patterns[key]:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"{key} has {expression!r}: {error}") from error
    for rank in (config["r"], *patterns["rank_pattern"].values()):
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"a rank is {rank!r}")
    alphas = [float(alpha) for alpha in (config["lora_alpha"], *patterns["alpha_pattern"].values())]
    if not all(math.isfinite(alpha) for alpha in alphas):
        raise ValueError("an alpha is not finite")
    return {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": config.get("lora_dropout", 0.0),
        "rslora": config.get("use_rslora", False),
        "dora": bool(config.get("use_dora", False)),
        **patterns,
    }


def _is_beside_adapter(key: str) -> bool:
    return _KEY.fullmatch(key) is not None or key.endswith((_BASE_WEIGHT, TOKENS, MAGNITUDE))


def _modules(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, list[str]]:
    """Modules that were trained whole -> the names of their weights. As in PEFT a module is one whose name ends in an
    entry of `modules_to_save`; of several that lie in each other, the outermost.
    """
    ends = tuple(map(str, config.get("modules_to_save") or ()))
    found: dict[str, list[str]] = {}
    for key in keys:
        parts = key.removeprefix(PREFIX).split(".")
        outer = (".".join(parts[:length]) for length in range(1, len(parts)))
        if not ends or _is_beside_adapter(key) or (name := next((n for n in outer if n.endswith(ends)), None)) is None:
            continue
        found.setdefault(name, []).append(key.removeprefix(f"{PREFIX}{name}."))
    return found


def _check_plain(folder: Path, config: Mapping[str, Any], keys: Iterable[str], taken_by: str) -> None:
    """Refuse what is more or other than LoRA matrices beside the base, or beside what they left of it.

    Raises:
        RunError: names the option, or the tensor.
    """
    begun = str(config.get("init_lora_weights", "")).lower()
    strange = [f"{key} = {value!r}" for key, value in config.items() if key not in PLAIN_KEYS and value not in OFF]
    strange += [f"init_lora_weights = {begun!r}"] if begun.startswith(CHANGES_BASE) and not taken_by else []
    strange += [f"peft_type = {kind!r}"] if (kind := config.get("peft_type", "LORA")) != "LORA" else []
    allowed = (_BASE_WEIGHT, TOKENS, MAGNITUDE) if config.get("use_dora") else (_BASE_WEIGHT, TOKENS)
    strange += [f"the tensor {key}" for key in keys if not _KEY.fullmatch(key) and not key.endswith(allowed)]
    if config.get("use_dora") and not any(key.endswith(MAGNITUDE) for key in keys):
        strange.append("use_dora = True without magnitudes")
    if strange:
        raise RunError(
            f"The adapter in {folder} is not LoRA alone: {', '.join(strange[:3])}.",
            "Allowed: LoRA's A and B on linear layers, embedding and head, DoRA's magnitudes, tokens' rows, modules "
            "trained whole.",
            "Merge it into its base with PEFT (merge_and_unload), and use the merged model.",
        )


def read_adapter(model: "PreTrainedModel", folder: Path) -> dict[str, LoraLinear]:
    """Attach the adapter in `folder` to a base without adapters; name -> adapter.

    Raises:
        RunError: a file is missing or damaged, or the adapter does not fit the model.
    """
    stored = StoredAdapter(folder)
    stored.check_layers(model)
    adapters = attach_adapters(model, stored.names, **stored.settings)
    if stored.tokens:
        train_rows(model, next(iter(stored.tokens.values())))
    train_modules(model, stored.modules)
    _fill(adapters, stored)
    _fill_rows(model, stored)
    _fill_modules(trained_modules(model), stored)
    return adapters


def restore_adapter(model: nn.Module, folder: Path, new: Collection[str] = ()) -> None:
    """Give the adapters that the model has the weights in `folder`.

    Args:
        new: modules trained whole that the folder need not have: they stay as they begin.

    Raises:
        RunError: a file is missing or damaged, or holds other adapters.
    """
    adapters, stored = adapters_of(model), StoredAdapter(folder)
    if unknown := sorted(set(stored.names) - adapters.keys()):
        raise RunError(f"{folder / WEIGHTS_NAME} holds {unknown[0]}, for which this run has no adapter.")
    modules = trained_modules(model)
    modules = {name: module for name, module in modules.items() if name in stored.modules or name not in new}
    if modules.keys() != stored.modules.keys():
        differing = sorted(modules.keys() ^ stored.modules.keys())
        whose = "this run" if differing[0] in modules else f"the adapter in {folder}"
        raise RunError(
            f"Only {whose} has {differing[0]} trained whole.",
            "An adapter is trained on with the modules that it has (modules_to_save).",
        )
    _fill(adapters, stored)
    _fill_rows(model, stored)
    _fill_modules(modules, stored)


def _fill_modules(modules: Mapping[str, TrainedModule], stored: StoredAdapter) -> None:
    with torch.no_grad():
        for name, module in modules.items():
            weights = stored.module_weights(name, module.trained)
            for leaf, parameter in module.trained.named_parameters():
                parameter.copy_(weights[leaf])


def _fill_rows(model: nn.Module, stored: StoredAdapter) -> None:
    rows = token_rows(model)
    if not stored.tokens:
        return  # an adapter without such rows is trained on: they begin with the base's
    trained = {name: model.get_submodule(name).tokens for name in rows}
    lost = [name for name in rows if name not in stored.tokens and stored.says_rows_of(name)]
    if lost or not stored.tokens.items() <= trained.items():
        raise RunError(
            f"The adapter in {stored.folder} has rows of other tokens than this run trains.",
            "Allowed: the same tokens in embedding and head, or in one of them.",
        )
    with torch.no_grad():
        for name in stored.tokens:  # of an end that it leaves alone the rows stay the base's
            rows[name].copy_(stored.token_rows(name, rows[name].shape[1]))


def _fill(adapters: dict[str, LoraLinear], stored: StoredAdapter) -> None:
    with torch.no_grad():
        for name, adapter in adapters.items():
            if isinstance(adapter, LoraExperts):
                sizes = (adapter.num_experts, adapter.in_features, adapter.out_features)
                a, b = stored.expert_matrices(name, *sizes, adapter.base.turned_in_peft)
            else:
                a, b = stored.matrices(name, adapter.in_features, adapter.out_features)
            adapter.lora_A.copy_(a)
            adapter.lora_B.copy_(b)
            adapter.taken_by = stored.taken_by
            if isinstance(adapter, DoraLinear):
                adapter.magnitude.copy_(stored.magnitude(name, adapter.out_features))
            weight = getattr(adapter.base, "weight", None)
            if isinstance(weight, Tensor) and not isinstance(adapter, LoraExperts):
                stored.check_base(name, weight)
            if begun := stored.initial(name, adapter.in_features, adapter.out_features):
                adapter.initial = (begun[0].to(adapter.lora_A.device), begun[1].to(adapter.lora_B.device))
