"""PEFT's LoRA layers as nybble's decoder blocks take adapters: the same parameters, seen as a `LoraLinear`."""

import sys
from typing import Any

from torch import nn

from nybble.layers.convert import is_linear
from nybble.layers.lora import DoraLinear, LoraLinear, row_norms


def is_peft_lora(module: nn.Module) -> bool:
    """Whether it is PEFT's LoRA layer around a linear one; PEFT need not be installed."""
    layers = sys.modules.get("peft.tuners.lora.layer")
    return layers is not None and isinstance(module, layers.Linear)


def active_adapter(layer: Any) -> str | None:
    """The adapter that computes beside a PEFT layer; None where none does."""
    if layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    return active[0] if active else None


def state_of(layer: Any) -> tuple[object, ...]:
    """What decides which view of a PEFT layer is the right one."""
    return layer.disable_adapters, layer.merged, tuple(layer.active_adapters), tuple(layer.scaling.values())


def why_not_viewed(module: Any, *, training: bool) -> str | None:
    """Why decoder blocks cannot compute this layer as it is now, or None."""
    if not is_peft_lora(module):
        return None if is_linear(module) else f"of a {type(module).__name__}"
    name = active_adapter(module)
    if name is None:
        return None
    if len([each for each in module.active_adapters if each in module.lora_A]) > 1:
        return "of several active adapters"
    if training and isinstance(module.lora_dropout[name], nn.Dropout) and module.lora_dropout[name].p > 0:
        return "of the adapter's dropout"
    if module.lora_bias[name]:
        return "of the adapter's bias"
    if (variant := module.lora_variant.get(name)) is not None and not module.use_dora[name]:
        return f"of {type(variant).__name__}"
    return None


def view(module: Any) -> nn.Module:
    """The layer as decoder blocks take it: a frozen linear layer, or one with the active adapter beside it."""
    if not is_peft_lora(module):
        return module
    name = active_adapter(module)
    base = module.get_base_layer()
    if name is None:
        return base
    kind = DoraLinear if module.use_dora[name] else LoraLinear
    adapter: Any = kind.__new__(kind)
    nn.Module.__init__(adapter)
    adapter.base, adapter.in_features, adapter.out_features = base, module.in_features, module.out_features
    adapter.rank, adapter.alpha, adapter.rslora = module.r[name], module.lora_alpha[name], module.use_rslora[name]
    adapter.dropout, adapter.scaling, adapter.enabled = 0.0, module.scaling[name], True
    adapter.lora_A, adapter.lora_B = module.lora_A[name].weight, module.lora_B[name].weight
    if isinstance(adapter, DoraLinear):
        adapter._base_norms = row_norms(base)
        adapter._norms, adapter._versions = adapter._base_norms, (-1, -1)
        adapter.magnitude = module.lora_magnitude_vector[name].weight
    return adapter
