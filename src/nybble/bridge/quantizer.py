"""transformers' quantizer for nybble's formats: weights go into few bits while a model loads, or come so from files.

Registered under the method "nybble" (`transformers.quantizers.auto.register_quantizer`). transformers reads one tensor,
hands it to `_Quantize`, and puts what comes back into the model before it reads the next. A stored weight is several
tensors (`formats/bnb.py`), which `_Deserialize` makes one of. Saving gives the same tensors back.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from nybble.bridge.config import METHOD, NybbleConfig
from nybble.bridge.weights import (
    few_bit_parameters,
    put_experts,
    put_weight,
    stored_parameters,
    straighten,
    transposed,
)
from nybble.errors import ModelError
from nybble.formats.bnb import from_bnb, state_key
from nybble.formats.format import FORMATS
from nybble.formats.quantized_stack import OFFSETS, STATE, stack_of_tensors, stored_tensors
from nybble.layers.experts_weight import frozen_experts
from nybble.layers.quantized_experts import IMPLEMENTATION, expert_shapes, own_experts
from nybble.layers.quantized_weight import frozen_parameter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = (".quant_map", ".absmax", ".nested_absmax", ".nested_quant_map", ".zero_points")
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


@register_quantizer(METHOD)
class NybbleQuantizer(HfQuantizer):
    """What transformers asks while it loads, trains and saves a model in nybble's formats.

    Attributes:
        names: parameters that go into few bits, or that a folder holds so.
        stacks: those of them that are one projection of all experts, and whether their matrices are `[in, out]`.
        turned: those that a 16-bit file holds as [in, out].
    """

    quantization_config: NybbleConfig
    is_trainable = True

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **keywords: Any) -> None:
        """Refuse devices that a model in few bits cannot be spread over.

        Raises:
            ModelError: it names the disk, several devices, or one that is not here.
        """
        devices = set(map(str, device_map.values())) if isinstance(device_map, dict) else {str(device_map or "cpu")}
        cards = devices - {"cpu", *STRATEGIES}
        missing = cards if not torch.cuda.is_available() else cards & {"disk", "meta"}
        if missing or len(devices) > 1:
            raise ModelError(
                f"device_map is {device_map!r}.",
                "Allowed: one device for the whole model, the CPU or a GPU that is here; nothing on the disk.",
                'Leave device_map out, or write device_map="cpu".',
            )

    def update_device_map(self, device_map: Any) -> Any:
        """The whole model on one device, where transformers is to choose."""
        if device_map not in STRATEGIES:
            return device_map
        return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}

    def param_needs_quantization(self, model: "PreTrainedModel", param_name: str, **keywords: Any) -> bool:
        return param_name in self.names

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **keywords: Any) -> None:
        config = self.quantization_config
        self.names = set(few_bit_parameters(model, config, is_stored=self.pre_quantized))
        shapes = expert_shapes(model)
        self.stacks = {name: shapes[name].transposed for name in shapes if name in self.names}
        own_experts(model, self.stacks)
        self.turned = transposed(model, self.names)
        straighten(model, self.names)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Of a stored folder: what makes one weight of its tensors."""
        if not self.pre_quantized:
            return []
        states = [state_key("", format) for format in FORMATS.values()]
        converters = [_converter("weight", [*PARTS, *states], self)]
        stack_parts = [*PARTS, OFFSETS, *(f"{STATE}{format}" for format in FORMATS)]
        leaves = {".".join(name.split(".")[-2:]) for name in self.stacks}
        return [_converter(leaf, stack_parts, self) for leaf in sorted(leaves)] + converters

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **keywords: Any) -> "PreTrainedModel":
        if self.stacks:
            model.set_experts_implementation(IMPLEMENTATION)
        self.own(model)
        return model

    def own(self, model: "PreTrainedModel") -> None:
        """Let transformers, accelerate and PEFT know how the model is kept."""
        model.hf_quantizer, model.is_quantized, model.quantization_method = self, True, METHOD
        model.is_loaded_in_4bit = True  # what PEFT's prepare_model_for_kbit_training asks
        model.config.quantization_config = self.quantization_config
        # Saved under the names that the model has: conversions cannot be turned back on packed bytes.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [each for each in conversions if not isinstance(each, WeightConverter)]

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors to store, each weight in few bits as `nybble quantize` stores it."""
        stored = stored_parameters(model)
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in stored}
        for name, q in stored.items():
            state |= stored_tensors(name, q)
        return state, {}

    def _dequantize(self, model: "PreTrainedModel", dtype: torch.dtype | None = None) -> "PreTrainedModel":
        raise ModelError(
            "A model in few bits is asked for its dense weights.",
            "They do not come back: what was rounded is lost.",
            "Load the 16-bit model, or write the rounded weights in 16 bits with `nybble merge`.",
        )


class _Quantize(ConversionOps):
    """Dense tensors into few bits."""

    def __init__(self, quantizer: NybbleQuantizer):
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], **_: Any) -> Any:
        quantizer, result = self.quantizer, {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            if name in quantizer.stacks:
                config, transposed = quantizer.quantization_config, quantizer.stacks[name]
                result[name] = put_experts(name, value, config, transposed)
            elif name in quantizer.names:
                value = value.T if name in quantizer.turned else value
                result[name] = put_weight(name, value, quantizer.quantization_config)
            else:
                result[name] = value
        return result


class _Deserialize(ConversionOps):
    """The stored tensors of a weight into one; of what is stored in 16 bits, as it is."""

    def __init__(self, quantizer: NybbleQuantizer):
        self.hf_quantizer = quantizer  # transformers leaves dtypes alone where it finds this name

    def convert(
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        full_layer_name: str = "",
        **_: Any,
    ) -> Any:
        parts = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        leaf = min(parts, key=len)
        dtype = _dtype_of(model, full_layer_name)
        if len(parts) == 1:
            return {leaf: parts[leaf].to(dtype)}
        tensors = {f"{full_layer_name}{key.removeprefix(leaf)}": value for key, value in parts.items()}
        transposed = self.hf_quantizer.stacks.get(full_layer_name)
        if transposed is None:
            return {leaf: frozen_parameter(from_bnb(full_layer_name, tensors), dtype)}
        return {leaf: frozen_experts(stack_of_tensors(full_layer_name, tensors), dtype, transposed)}


def _dtype_of(model: Any, name: str) -> torch.dtype:
    dtype: torch.dtype = model.get_parameter(name).dtype
    return dtype


def _converter(leaf: str, parts: list[str], quantizer: NybbleQuantizer) -> WeightConverter:
    return WeightConverter([leaf, *(f"{leaf}{part}" for part in parts)], leaf, [_Deserialize(quantizer)])
