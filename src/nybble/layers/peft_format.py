"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Key of a tensor: `base_model.model.<layer>.lora_A.weight` `[r, in]` and `.lora_B.weight` `[out, r]`, fp32.
Adapters that began with something other than B = 0 have a third file, `initial.safetensors`, with the same keys: what
they began with. PEFT does not look at it: on the quantised base the adapter is whole without it.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nybble.errors import RunError
from nybble.layers.convert import adapters_of, attach_adapters, quantizable_linears
from nybble.layers.lora import LoraLinear, lora_scaling

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
INITIAL_NAME = "initial.safetensors"
_PREFIX = "base_model.model."


def adapter_tensors(adapters: dict[str, LoraLinear]) -> dict[str, Tensor]:
    """PEFT's keys -> fp32 tensors on the CPU."""
    tensors = {}
    for name, adapter in adapters.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = adapter.lora_A.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = adapter.lora_B.detach().cpu().contiguous()
    return tensors


def initial_tensors(adapters: dict[str, LoraLinear]) -> dict[str, Tensor]:
    """PEFT's keys -> what the adapters began with; empty where that was B = 0."""
    tensors = {}
    for name, adapter in adapters.items():
        if adapter.initial is not None:
            a, b = adapter.initial
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.cpu().contiguous()
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.cpu().contiguous()
    return tensors


def adapter_config(model: nn.Module, base_name: str, *, alpha: float, rslora: bool) -> dict[str, Any]:
    """What PEFT needs to know to put the adapter on its base."""
    adapters = adapters_of(model)
    first = next(iter(adapters.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": first.rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "use_rslora": rslora,
        "target_modules": _shortest_targets(model, list(adapters)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _shortest_targets(model: nn.Module, names: list[str]) -> list[str]:
    """Leaf names where they match exactly the adapted layers, else the full names."""
    leaves = sorted({name.rpartition(".")[2] for name in names})
    same_leaf = [name for name in quantizable_linears(model) if name.rpartition(".")[2] in leaves]
    return leaves if sorted(same_leaf) == sorted(names) else sorted(names)


def write_adapter(model: nn.Module, folder: Path, config: dict[str, Any]) -> None:
    """Write the model's adapters into an existing folder."""
    save_file(adapter_tensors(adapters_of(model)), folder / WEIGHTS_NAME, metadata={"format": "pt"})
    if initial := initial_tensors(adapters_of(model)):
        save_file(initial, folder / INITIAL_NAME, metadata={"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_adapter(model: nn.Module, folder: Path) -> dict[str, LoraLinear]:
    """Attach the adapter in `folder` to a base without adapters; name -> adapter.

    Raises:
        RunError: a file is missing or damaged, or the adapter does not fit the model.
    """
    config, tensors = _read_files(folder)
    names = sorted({key.removeprefix(_PREFIX).rsplit(".", 2)[0] for key in tensors})
    linears = set(quantizable_linears(model))
    if unknown := [name for name in names if name not in linears]:
        raise RunError(
            f"The adapter in {folder} is for layer {unknown[0]!r}, which this base does not have.",
            "Allowed: an adapter trained on the same base.",
        )
    adapters = attach_adapters(
        model,
        names,
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        rslora=config.get("use_rslora", False),
    )
    _fill(adapters, tensors, folder)
    return adapters


def restore_adapter(model: nn.Module, folder: Path) -> None:
    """Give the adapters that the model has the weights in `folder`.

    Raises:
        RunError: a file is missing or damaged, or holds other adapters.
    """
    adapters, (_, tensors) = adapters_of(model), _read_files(folder)
    if unknown := sorted(tensors.keys() - _keys(adapters)):
        raise RunError(f"{folder / WEIGHTS_NAME} holds {unknown[0]}, for which this run has no adapter.")
    _fill(adapters, tensors, folder)


def _keys(adapters: Iterable[str]) -> set[str]:
    """PEFT's keys of the tensors of these adapters, given by their layers' names."""
    return {f"{_PREFIX}{name}.{part}.weight" for name in adapters for part in ("lora_A", "lora_B")}


def _fill(adapters: dict[str, LoraLinear], tensors: dict[str, Tensor], folder: Path) -> None:
    for name, adapter in adapters.items():
        for part in ("lora_A", "lora_B"):
            key = f"{_PREFIX}{name}.{part}.weight"
            with torch.no_grad():
                getattr(adapter, part).copy_(_checked(tensors, key, getattr(adapter, part), folder / WEIGHTS_NAME))
    if (folder / INITIAL_NAME).is_file():
        initial = _load(folder / INITIAL_NAME)
        for name, adapter in adapters.items():
            a, b = (
                _checked(initial, f"{_PREFIX}{name}.{part}.weight", parameter, folder / INITIAL_NAME)
                for part, parameter in (("lora_A", adapter.lora_A), ("lora_B", adapter.lora_B))
            )
            adapter.initial = (a.to(adapter.lora_A.device), b.to(adapter.lora_B.device))


def _read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise RunError(f"{folder} has no {name}.", "An adapter folder holds both.", "Check the path.")
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
        lora_scaling(config["lora_alpha"], config["r"], config.get("use_rslora", False))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise _damaged(folder / CONFIG_NAME, error) from error
    return config, _load(folder / WEIGHTS_NAME)


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> RunError:
    return RunError(f"The adapter in {file.parent} is damaged: {file.name}: {error}.", "", "Use an earlier checkpoint.")


def _checked(tensors: dict[str, Tensor], key: str, parameter: nn.Parameter, file: Path) -> Tensor:
    tensor = tensors.get(key)
    if tensor is None or tensor.shape != parameter.shape:
        found = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
        raise RunError(f"{file}: {key} should have shape {tuple(parameter.shape)}; found {found}.")
    return tensor
