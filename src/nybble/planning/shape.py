"""The widths that decide what a model costs, read off its own parameters."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from nybble.families import family_of
from nybble.families.family import Family
from nybble.layers.convert import TOWERS, is_linear
from nybble.layers.dense import is_encoder_decoder, narrow_ends
from nybble.layers.lora import linear_features
from nybble.layers.mixers import held_values
from nybble.layers.quantized_experts import experts_given_all
from nybble.planning.run_shape import ModelShape, TowerShape
from nybble.sources.inventory import take_inventory
from nybble.sources.parts import BlockParts, Inventory

LOGIT_FACTORS = ("logit_scale", "logits_scaling")  # of configs
# Activations that are made of several functions -> how many tensors these hold.
SPELLED_OUT = {"NewGELUActivation": 4, "FastGELUActivation": 6, "QuickGELUActivation": 2}

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shape_of(model: "PreTrainedModel", in_four_bits: Collection[str] | None = None) -> ModelShape:
    """The shape of a model, which may be on the meta device.

    Args:
        in_four_bits: names of the linear layers that are or will be; all of the blocks' if not given.
    """
    parts = take_inventory(model, in_four_bits)
    own = parts if is_encoder_decoder(model) else _without_tower(parts)
    hidden = _hidden_size(own)
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    family = family_of(config)
    query, key_value = _attention_widths(own, hidden, family, config)
    last = _leaf(family.down) if family else "down_proj"
    mixer_values, mixer_chunk = held_values(model)
    shape = ModelShape(
        parts,
        hidden_size=hidden,
        num_heads=heads if isinstance(heads, int) else 1,
        query_width=query,
        key_value_width=key_value,
        intermediate_size=max((_mlp_width(block, hidden, last) for block, _ in own.blocks), default=hidden),
        expert_width=max((_expert_width(block, hidden) for block, _ in parts.blocks), default=0),
        dense_width=max((_dense_width(block, hidden, last) for block, _ in own.blocks), default=hidden),
        narrow_ends=bool(narrow_ends(model)),
        dropped_states=any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()),
        dropped_attention=_drops_attention(model, config),
        mixer_values=mixer_values,
        mixer_chunk=mixer_chunk,
        given_all=experts_given_all(model),
        **_of_head(model, config),
        **(_of_encoder_decoder(model, parts) if is_encoder_decoder(model) else {}),
        **_of_family(family, config),
    )
    return _with_kinds(shape, model, family, config) if family is not None and family.beside else shape


def _with_kinds(shape: ModelShape, model: "PreTrainedModel", family: Family, config: Any) -> ModelShape:
    """The shape with what its layers read beside the states, and where their widths differ."""
    found: Counter[tuple[int, int, int, bool, int]] = Counter()
    given = 0
    decoder: Any = model.get_decoder()
    for i, layer in enumerate(decoder.layers):
        own = family.of_layer(config, i)
        query = linear_features(layer.get_submodule(own.qkv[0]))[1]
        key_value = query // layer.self_attn.num_key_value_groups
        inner = linear_features(layer.get_submodule(own.down))[0]
        found[query, key_value, inner, family.reads_keys(config, i), len(own.qkv)] += 1
        given += 2 * key_value * family.gives_keys(config, i)
    width = getattr(config, family.layer_inputs) if family.layer_inputs is not None else 0
    shape = replace(
        shape,
        layer_input_width=width,
        beside_width=given + width * shape.num_layers,
        query_width=max(query for query, *_ in found),
        key_value_width=max(key_value for _, key_value, *_ in found),
    )
    kinds = []
    for (query, key_value, inner, reads, layers), count in found.items():
        kind = replace(shape, query_width=query, key_value_width=key_value, reads_keys=reads, qkv_layers=layers)
        kinds.append((replace(kind, intermediate_size=inner, dense_width=inner), count))
    return replace(shape, kinds=tuple(kinds))


def _without_tower(parts: Inventory) -> Inventory:
    return replace(parts, blocks=tuple((block, count) for block, count in parts.blocks if not block.encodes))


def tower_of(model: "PreTrainedModel") -> TowerShape | None:
    """The shape of what a vision-language model reads pictures with; None of other models."""
    towers = getattr(model.config, TOWERS, None)
    if towers is None:
        return None
    decoder: Any = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    parts = [module for module in model.base_model.modules() if id(module) not in inside]
    filters = [module for module in parts if isinstance(module, nn.Conv2d | nn.Conv3d)]
    lists = [module for module in parts if isinstance(module, nn.ModuleList)]
    blocks = list(max(lists, key=len).modules()) if lists else parts
    linears = [linear_features(module) for module in blocks if is_linear(module)]
    # Some cut pictures into patches by a linear layer, and not by filters.
    first = filters[0].weight if filters else next(module.weight for module in parts if is_linear(module))
    config = getattr(model.config, "vision_config", model.config)
    size, patch = getattr(config, "image_size", None) if filters else None, first.shape[-1]
    width = first.shape[0]
    inner = max((max(each) for each in linears), default=4 * width)
    return TowerShape(
        patch_values=first[0].numel(),
        width=width,
        intermediate_size=inner,
        num_layers=max(map(len, lists), default=1),
        patches=(size // patch) ** 2 if isinstance(size, int) else 0,
        adapted=towers == "all",
        **_of_mlp(blocks, width, inner),
    )


def _drops_attention(model: nn.Module, config: Any) -> bool:
    """Whether parts of the attention matrix are dropped, under whichever name a config says it; an encoder-decoder's
    one share may be for that too.
    """
    if is_encoder_decoder(model):
        kinds = (module for module in model.modules() if "Attention" in type(module).__name__)
        return any(isinstance(share := getattr(kind, "dropout", 0), float) and share > 0 for kind in kinds)
    shares = (value for name, value in config.to_dict().items() if "drop" in name and "att" in name)
    return any(isinstance(share, float) and share > 0 for share in shares)


def _of_encoder_decoder(model: "PreTrainedModel", parts: Inventory) -> dict[str, Any]:
    """What encoder-decoders have: of the MLP's inner width what the activation holds, with a gate both factors, and
    what is dropped, with its factors, else what the last layer reads.
    """
    hidden = _hidden_size(parts)
    inner = max((_mlp_width(block, hidden, "down_proj") for block, _ in parts.blocks), default=hidden)
    modules = list(model.modules())
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in modules)
    drops = drops or bool(getattr(model.config, "activation_dropout", 0))
    biased = any(name.endswith("relative_attention_bias") for name, _ in model.named_modules())
    return {"crossed": True, "biased_attention": biased} | _of_mlp(modules, hidden, inner, drops)


def _of_head(model: "PreTrainedModel", config: Any) -> dict[str, Any]:
    """What is done to logits after the product, as far as configs say it (`layers/own_head.py` asks the model)."""
    head: Any = model.get_output_embeddings()
    capped = bool(getattr(config, "final_logit_softcapping", None))
    scaled = any(getattr(config, name, 1.0) not in (None, 1.0) for name in LOGIT_FACTORS)
    scaled = scaled or bool(getattr(config, "scale_decoder_outputs", False))  # T5's, where the head is tied
    return {
        "wide_logits": capped or scaled or getattr(head, "bias", None) is not None,
        "capped_logits": capped,
    }


def _of_mlp(modules: Sequence[nn.Module], hidden: int, inner: int, drops: bool = False) -> dict[str, Any]:
    """What blocks made of these modules hold in their MLPs and norms, as `ModelShape` has it."""

    def widening(module: nn.Module) -> int:
        return sum(is_linear(each) and linear_features(each) == (hidden, inner) for each in module.children())

    spelled = [SPELLED_OUT[type(module).__name__] for module in modules if type(module).__name__ in SPELLED_OUT]
    gated = any(widening(module) > 1 for module in modules)
    return {
        "inner_values": max(spelled, default=1) + 2 * gated + 1 + drops,
        "widened_norms": not any(isinstance(module, nn.LayerNorm) for module in modules),
    }


def _of_family(family: Family | None, config: Any) -> dict[str, Any]:
    """What decoder blocks of the family have; nothing for other models, which go another way."""
    if family is None:
        return {}
    return {
        "input_norms": family.input_norms,
        "added_norms": family.added_norms,
        "normed_heads": bool(family.head_norms),
        "values_normed": len(family.head_norms) > 2,
        "heads_together": family.heads_together,
        "scaled_residual": family.residual_factor(config) != 1.0,
        "norm_values": 2 if family.norm == "layer" else 1,
        "qkv_layers": len(family.qkv),
        "gate_up_layers": len(family.gate_up),
        "gated": family.gated,
        "parallel": family.parallel,
        "last_layers": tuple(map(_leaf, (family.down, family.o) if family.parallel else (family.down,))),
    }


def _attention_widths(parts: Inventory, hidden: int, family: Family | None, config: Any) -> tuple[int, int]:
    """Of all queries, and of all keys."""
    widths = [block.widths for block, _ in parts.blocks]
    if family is not None and len(family.qkv) == 1:
        head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        return config.num_attention_heads * head, config.num_key_value_heads * head
    query = max((found[name][1] for name in ("q_proj", "q") for found in widths if name in found), default=hidden)
    key = max((found[name][1] for name in ("k_proj", "k") for found in widths if name in found), default=query)
    return query, key


def _hidden_size(parts: Inventory) -> int:
    """What the head reads; where blocks are wider than their ends, what most of their linears take."""
    widths = [i for block, count in parts.blocks for _, i, _ in block.linears for _ in range(count)]
    width = parts.head[1]
    return width if not widths or width in widths else max(set(widths), key=widths.count)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _expert_width(block: BlockParts, hidden: int) -> int:
    """Of what an expert's last projection takes; 0 without experts."""
    inner = [size for shape in block.experts for size in shape[1:] if size != hidden]
    return min(inner, default=hidden) if block.experts else 0


def _mlp_width(block: BlockParts, hidden: int, last: str) -> int:
    """Of the MLP with the experts that a token passes."""
    return _dense_width(block, hidden, last) + block.passed_experts * _expert_width(block, hidden)


def _dense_width(block: BlockParts, hidden: int, last: str) -> int:
    """Of the MLP but its experts: what its last layer takes; where none is called as in Llama, and there are no
    experts, the widest there is.
    """
    linears = block.widths
    if last in linears:
        return linears[last][0]
    return 0 if block.experts else max((max(i, o) for _, i, o in block.linears), default=hidden)
