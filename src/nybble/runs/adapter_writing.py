"""Writing adapters in PEFT's format: those of a model, one for other programs, one of several."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from nybble.layers.convert import adapters_of
from nybble.layers.dense import is_encoder_decoder
from nybble.layers.lora import DoraLinear, LoraEmbedding, LoraLinear, linear_features
from nybble.layers.lora_experts import LoraExperts
from nybble.layers.picture_model import scores_pictures
from nybble.layers.scored import scores_tokens
from nybble.layers.token_rows import token_rows
from nybble.layers.trained import TrainedModule, trained_modules
from nybble.runs.adapter_files import (
    CONFIG_NAME,
    EMBEDDING,
    INITIAL_NAME,
    LINEAR,
    MAGNITUDE,
    PREFIX,
    TOKENS,
    WEIGHTS_NAME,
    StoredAdapter,
)
from nybble.runs.expert_keys import expert_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def adapter_tensors(adapters: dict[str, LoraLinear]) -> dict[str, Tensor]:
    """PEFT's keys -> fp32 tensors on the CPU."""
    tensors: dict[str, Tensor] = {}
    experts = [name for name, adapter in adapters.items() if isinstance(adapter, LoraExperts)]
    stored_as = expert_keys(experts, [name.rpartition(".")[0] for name in experts])
    for name, adapter in adapters.items():
        a, b = adapter.lora_A.detach(), adapter.lora_B.detach()
        if isinstance(adapter, LoraExperts):
            a, b = (b.mT, a.mT) if adapter.base.turned_in_peft else (a, b)
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)  # (E r, in), (out, r E)
        tensors |= _named(stored_as.get(name, name), adapter, a, b)
        if isinstance(adapter, DoraLinear):
            tensors[PREFIX + name + MAGNITUDE] = adapter.magnitude.detach().cpu()
    return tensors


def initial_tensors(adapters: dict[str, LoraLinear]) -> dict[str, Tensor]:
    """PEFT's keys -> what the adapters began with; empty where that was B = 0."""
    tensors: dict[str, Tensor] = {}
    for name, adapter in adapters.items():
        if adapter.initial is not None:
            tensors |= _named(name, adapter, *adapter.initial)
    return tensors


def _named(name: str, adapter: LoraLinear, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    leaves = EMBEDDING if isinstance(adapter, LoraEmbedding) else LINEAR
    return {f"{PREFIX}{name}.{leaf}": each.cpu().contiguous() for leaf, each in zip(leaves, (a, b), strict=True)}


def adapter_config(model: "PreTrainedModel", base_name: str) -> dict[str, Any]:
    """What PEFT needs to know to put the model's adapters on its base.

    Where experts that checkpoints store one by one are one tensor in the model, PEFT takes every target module of their
    names (`gate_proj`) for the experts. Other layers of these names are targets as parameters, which it leaves alone,
    and so are experts with adapters of their own; those have no dropout in PEFT.
    """
    adapters = adapters_of(model)
    first = next(iter(adapters.values()))
    rank, rank_pattern = _usual_and_others({name: adapter.rank for name, adapter in adapters.items()})
    alpha, alpha_pattern = _usual_and_others({name: adapter.alpha for name, adapter in adapters.items()})
    patterns = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    taken = _names_of_merged_experts(model)
    experts = [name for name, adapter in adapters.items() if isinstance(adapter, LoraExperts)]
    others = [name for name in adapters if name not in experts]
    as_parameters = [*experts, *(f"{name}.weight" for name in others if name.rpartition(".")[2] in taken)]
    as_modules = [name for name in others if f"{name}.weight" not in as_parameters]
    parameters: dict[str, Any] = {}
    if as_parameters:
        parameters["target_parameters"] = sorted(as_parameters)
    if any(isinstance(adapter, DoraLinear) for adapter in adapters.values()):
        parameters["use_dora"] = True
    if modules := trained_modules(model):
        parameters["modules_to_save"] = _shortest_ends(model, list(modules))
    if rows := token_rows(model):
        tokens = {name.rpartition(".")[2]: model.get_submodule(name).tokens for name in rows}
        parameters["trainable_token_indices"] = tokens
    if first.taken_by:
        parameters["init_lora_weights"] = first.taken_by
    return {
        **parameters,
        **{key: pattern for key, pattern in patterns.items() if pattern},
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if as_parameters else first.dropout,
        "use_rslora": first.rslora,
        "target_modules": _shortest_targets(model, as_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _task_type(model: "PreTrainedModel") -> str | None:
    """PEFT's word for what the model is for; it has none for pictures."""
    if scores_pictures(model):
        return None
    if model.get_output_embeddings() is not None:
        return "SEQ_2_SEQ_LM" if is_encoder_decoder(model) else "CAUSAL_LM"
    if model.base_model is model:
        return "FEATURE_EXTRACTION"
    return "TOKEN_CLS" if scores_tokens(model) else "SEQ_CLS"


def _usual_and_others(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What most layers have, and PEFT's pattern for the others: by the last part of their names where all layers that
    end so have the same, else by whole names.
    """
    usual = Counter(values.values()).most_common(1)[0][0]
    by_leaf: dict[str, set[Any]] = {}
    for name, value in values.items():
        by_leaf.setdefault(name.rpartition(".")[2], set()).add(value)
    pattern: dict[str, Any] = {}
    for name, value in values.items():
        leaf = name.rpartition(".")[2]
        if value != usual:
            pattern[leaf if len(by_leaf[leaf]) == 1 else name] = value
    return usual, pattern


def write_plain_adapter(adapter: "StoredAdapter", model: nn.Module, folder: Path) -> None:
    """Write an adapter into an existing folder for those who scale by alpha / rank and begin with B = 0.

    Args:
        model: the base, on the meta device.
    """
    alphas = {name: adapter.scaling_of(name) * adapter.rank_of(name) for name in adapter.names}
    alpha, alpha_pattern = _usual_and_others(alphas)
    config = adapter.config | {"use_rslora": False, "lora_alpha": alpha, "alpha_pattern": alpha_pattern}
    if not adapter.doubled:
        shutil.copyfile(adapter.folder / WEIGHTS_NAME, folder / WEIGHTS_NAME)
        write_config(folder, config)
        return
    rank, rank_pattern = _usual_and_others({name: adapter.rank_of(name) for name in adapter.names})
    tensors: dict[str, Tensor] = {}
    for name in adapter.names:
        pair = adapter.matrices(name, *linear_features(model.get_submodule(name)))
        tensors |= {f"{PREFIX}{name}.{leaf}": each for leaf, each in zip(LINEAR, pair, strict=True)}
    for name in adapter.tokens:
        tensors[PREFIX + name + TOKENS] = adapter.token_rows(name, model.get_parameter(f"{name}.weight").shape[1])
    for name in adapter.modules:
        weights = adapter.module_weights(name, model.get_submodule(name))
        tensors |= {f"{PREFIX}{name}.{leaf}": weight for leaf, weight in weights.items()}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    write_config(folder, config | {"r": rank, "rank_pattern": rank_pattern, "init_lora_weights": True})


def write_merged_adapter(
    adapters: Sequence["StoredAdapter"], merged: Mapping[str, tuple[Tensor, Tensor]], folder: Path
) -> None:
    """Write A and B of layers, their scaling in them, into an existing folder.

    Args:
        adapters: that they were made of; what else a config says is the first one's.
    """
    rank, rank_pattern = _usual_and_others({name: len(a) for name, (a, _) in merged.items()})
    patterns = {"rank_pattern": rank_pattern, "alpha_pattern": rank_pattern}
    own = {"r": rank, "lora_alpha": rank, "use_rslora": False, "target_modules": sorted(merged)}
    kept = {key: value for key, value in adapters[0].config.items() if key not in ("target_parameters", *patterns)}
    tensors: dict[str, Tensor] = {}
    for name, pair in merged.items():
        leaves = next(each for each in adapters if name in each.names).leaves(name)
        tensors |= {f"{PREFIX}{name}.{leaf}": each.contiguous() for leaf, each in zip(leaves, pair, strict=True)}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    write_config(folder, kept | own | {key: pattern for key, pattern in patterns.items() if pattern})


def _names_of_merged_experts(model: "PreTrainedModel") -> set[str]:
    """Last parts of the names of weights that transformers merges, over all experts, when it loads a checkpoint."""
    merging = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter)]
    patterns = [pattern for converter in merging for pattern in converter.source_patterns if ".*." in pattern]
    return {pattern.removesuffix(".weight").rpartition(".")[2] for pattern in patterns}


def _shortest_targets(model: nn.Module, names: list[str]) -> list[str]:
    """Leaf names where, among all modules, they match exactly the adapted layers, else the full names."""
    leaves = sorted({name.rpartition(".")[2] for name in names})
    same_leaf = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves]
    return leaves if sorted(same_leaf) == sorted(names) else sorted(names)


def _shortest_ends(model: nn.Module, modules: Sequence[str]) -> list[str]:
    """Last parts of names where, by PEFT's rule, exactly these modules' names end so, else whole names."""
    ends = sorted({name.rpartition(".")[2] for name in modules})
    inside = tuple(f"{name}." for name in modules)
    alike = [n for n, _ in model.named_modules() if n.endswith(tuple(ends)) and not n.startswith(inside)]
    return ends if sorted(alike) == sorted(modules) else sorted(modules)


def module_tensors(modules: Mapping[str, TrainedModule]) -> dict[str, Tensor]:
    """PEFT's keys -> fp32 weights on the CPU of modules that are trained whole."""
    weights = {n: module.trained.named_parameters() for n, module in modules.items()}
    return {f"{PREFIX}{n}.{leaf}": w.detach().cpu() for n, named in weights.items() for leaf, w in named}


def write_adapter(model: nn.Module, folder: Path, config: dict[str, Any]) -> None:
    """Write the model's adapters into an existing folder."""
    tensors = adapter_tensors(adapters_of(model))
    tensors |= module_tensors(trained_modules(model))
    tensors |= {PREFIX + name + TOKENS: rows.detach().cpu() for name, rows in token_rows(model).items()}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    if initial := initial_tensors(adapters_of(model)):
        save_file(initial, folder / INITIAL_NAME, metadata={"format": "pt"})
    write_config(folder, config)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write PEFT's `adapter_config.json`; the order of patterns stays, since the first that matches counts."""
    (folder / CONFIG_NAME).write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n", encoding="utf-8")
