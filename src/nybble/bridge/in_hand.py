"""`quantize_`: a transformers model that is in memory, put into few bits."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from nybble.bridge.config import NybbleConfig
from nybble.bridge.quantizer import NybbleQuantizer
from nybble.bridge.weights import few_bit_parameters, put_experts, put_weight, straighten
from nybble.errors import ModelError
from nybble.formats.format import DEFAULT_FORMAT
from nybble.layers.convert import in_few_bits
from nybble.layers.quantized_experts import IMPLEMENTATION, expert_shapes, own_experts


def quantize_(
    model: PreTrainedModel,
    format: str = DEFAULT_FORMAT,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    quality: str = "absmax",
    skip_modules: Sequence[str] = (),
) -> PreTrainedModel:
    """Put a transformers model that is in memory into few bits, in place, one weight at a time.

    The result is what `from_pretrained` with a `NybbleConfig` of these options gives, and is frozen.

    Args:
        format, block_size, double_quant, quality, skip_modules: as of `NybbleConfig`.

    Returns:
        the model.

    Raises:
        ConfigError, FormatError: as `NybbleConfig`; skip_modules names nothing of the model.
        ModelError: the model is already quantised, has adapters, or is none of transformers.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> in_hand = nybble.quantize_(AutoModelForCausalLM.from_pretrained(tiny), "nf4")
        >>> in_hand.model.layers[0].mlp.up_proj.weight
        QuantizedWeight(shape=(128, 64), dtype=torch.float32, nf4)
    """
    config = NybbleConfig(format, block_size, double_quant, quality, skip_modules)
    if not isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
        raise ModelError(
            f"A {type(model).__name__} cannot be put into few bits.",
            "Allowed: a model of transformers, without adapters.",
            "Quantise first, and give it adapters (get_peft_model) then.",
        )
    if getattr(model, "is_quantized", False) or in_few_bits(model):
        raise ModelError(
            f"{type(model).__name__} is already quantised.",
            "Allowed: a model in 16 or 32 bits; quantising twice loses quality each time.",
        )
    names = few_bit_parameters(model, config)
    model.requires_grad_(False)
    straighten(model, names)
    shapes = expert_shapes(model)
    own_experts(model, shapes)
    for name in names:
        value = model.get_parameter(name).detach()
        owner, _, leaf = name.rpartition(".")
        if name in shapes:
            made = put_experts(name, value, config, shapes[name].transposed)
        else:
            made = put_weight(name, value, config)
        setattr(model.get_submodule(owner), leaf, made)
    if shapes:
        model.set_experts_implementation(IMPLEMENTATION)
    NybbleQuantizer(config, pre_quantized=False).own(model)
    return model
