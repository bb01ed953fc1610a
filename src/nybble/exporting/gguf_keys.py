"""The hyperparameters of a model under llama.cpp's keys, and which models llama.cpp computes as transformers does.

A family's architecture in llama.cpp is its `Family.gguf`. Some of what a config says has no key there: llama.cpp takes
it for granted, or does without. What is taken for granted is refused where a config says otherwise.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PretrainedConfig

from nybble.errors import ExportError
from nybble.families import FAMILIES
from nybble.families.family import FULL, SLIDING
from nybble.formats.gguf import ARCHITECTURES as READ
from nybble.formats.gguf import (
    FACTORS,
    FREQUENCIES,
    LARGEST,
    NORMED_ROUTING,
    WINDOWLESS,
    llama3_divisors,
    proportional_divisors,
)

ARCHITECTURES = {name: family.gguf for name, family in FAMILIES.items() if family.gguf}
READABLE = {arch.name for arch, name in gguf.MODEL_ARCH_NAMES.items() if name in READ}  # by nybble
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
OWN_ROPE_TYPES = {"PHI3": (*ROPE_TYPES, "longrope"), "GEMMA4": ("default", "proportional")}
NO_ROPE_EVERY = 4  # which layer has no rotary angles in SmolLM3
FULL_EVERY = {"COHERE2": 4, "GEMMA2": WINDOWLESS["gemma2"], "GEMMA3": WINDOWLESS["gemma3"]}  # has no window
WINDOWED = ("OLMO2", "GEMMA4", *FULL_EVERY)  # architectures whose windows llama.cpp knows


def architecture_of(config: PretrainedConfig) -> gguf.MODEL_ARCH:
    """llama.cpp's; `check_family` has let the config pass."""
    return gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]


def check_family(config: PretrainedConfig) -> None:
    """Refuse a model that cannot be written as GGUF, before any long work.

    Raises:
        ExportError: names the families that can.
    """
    if config.model_type not in ARCHITECTURES:
        raise ExportError(
            f"GGUF export does not know the model type {config.model_type!r}.",
            f"Supported: {', '.join(ARCHITECTURES)} (SmolLM2 and most Llama relatives say llama).",
            "Export with --to 16bit and use llama.cpp's own converter.",
        )
    rope, known = rope_of(config), OWN_ROPE_TYPES.get(ARCHITECTURES[config.model_type], ROPE_TYPES)
    if rope["rope_type"] not in known:
        raise ExportError(
            f"The model scales its rotary frequencies by {rope['rope_type']!r}.",
            f"Supported in GGUF: {', '.join(known)}.",
            "Export with --to 16bit.",
        )
    for fits, allowed in _taken_for_granted(config):
        if not fits:
            raise ExportError(
                f"llama.cpp would compute another model than this {config.model_type} one.",
                f"Allowed in its architecture {gguf.MODEL_ARCH_NAMES[architecture_of(config)]}: {allowed}.",
                "Export with --to 16bit.",
            )


def _taken_for_granted(config: PretrainedConfig) -> list[tuple[bool, str]]:
    """What llama.cpp's architecture takes for granted: whether it is so, and in words."""
    arch, layers = ARCHITECTURES[config.model_type], range(1, config.num_hidden_layers + 1)
    granted = []
    if arch in ("OLMO2", "OLMOE", "PHI3", "STABLELM", "PHI2", "STARCODER2", "COHERE2", "COMMAND_R"):
        fits = head_dim(config) * config.num_attention_heads == config.hidden_size
        granted.append((fits, "heads that are together as wide as the hidden states"))
    if arch in ("OLMO2", "STABLELM", "PHI2", "QWEN2MOE", "OLMOE"):
        granted.append((not config.tie_word_embeddings, "a head of its own, not tied to the embedding"))
    if arch in ("COHERE2", "COMMAND_R", "GEMMA2"):
        granted.append((bool(config.tie_word_embeddings), "a head that is tied to the embedding"))
    if arch == "SMOLLM3":
        rotated = [bool(each) for each in config.no_rope_layers] == [layer % NO_ROPE_EVERY != 0 for layer in layers]
        granted.append((rotated, f"rotary angles in all layers but every {NO_ROPE_EVERY}th"))
        granted.append((SLIDING not in config.layer_types, "no windows"))
    if arch in FULL_EVERY:
        kinds = [SLIDING if layer % FULL_EVERY[arch] else FULL for layer in layers]
        granted.append((list(config.layer_types) == kinds, f"windows in all layers but one of {FULL_EVERY[arch]}"))
    if arch in ("GEMMA2", "GEMMA3"):
        scale = config.hidden_size // config.num_attention_heads if _is_27b(config) else head_dim(config)
        granted.append((config.query_pre_attn_scalar == scale, f"query_pre_attn_scalar {scale}"))
        granted.append((not config.use_bidirectional_attention, "attention to earlier tokens alone"))
    if arch == "GEMMA4":
        granted += _granted_of_gemma4(config)
    if arch == "GEMMA2":
        caps = config.attn_logit_softcapping and config.final_logit_softcapping
        granted.append((bool(caps), "soft caps on scores and logits"))
    if arch == "COMMAND_R":
        granted.append((not config.use_qk_norm, "no norms of queries and keys"))
    if arch in ("STABLELM", "PHI2"):
        granted.append((not config.qk_layernorm, "no norms of queries and keys"))
    if arch == "MISTRAL3":
        rope = rope_of(config)
        factors = (rope.get("mscale") or 0.0, rope.get("mscale_all_dim") or 0.0, rope.get("attention_factor"))
        granted.append((factors[0] == bool(factors[1]) and factors[2] is None, "mscale 1 beside mscale_all_dim"))
    if (normed := NORMED_ROUTING.get(gguf.MODEL_ARCH_NAMES[architecture_of(config)])) is not None:
        granted.append((config.norm_topk_prob == normed, f"norm_topk_prob {str(normed).lower()}"))
    if arch in ("QWEN2MOE", "QWEN3MOE"):
        sparse = config.decoder_sparse_step == 1 and not config.mlp_only_layers
        granted.append((sparse, "experts in all layers"))
    if arch in ("QWEN3MOE", "OLMOE"):
        granted.append((not config.attention_bias, "no biases"))
    if arch == "OLMOE":
        granted.append((config.clip_qkv is None, "no clip_qkv"))
        all_heads = config.num_key_value_heads == config.num_attention_heads
        granted.append((all_heads, "as many heads of keys as of queries"))
    if num_experts(config):
        granted.append((config.hidden_act == "silu", "the activation silu"))
    if (rope := rope_of(config))["rope_type"] == "yarn":
        granted += _granted_of_yarn(rope, arch)
    return granted


def _granted_of_yarn(rope: Mapping[str, Any], arch: str) -> list[tuple[bool, str]]:
    """Of YaRN's ramp, and of its factor on cosines and sines, for which one architecture alone has keys."""
    granted = [(rope.get("truncate", True), "a ramp of YaRN between whole dimensions (truncate true)")]
    if arch == "MISTRAL3":
        return granted
    ramp = (rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0)
    usual = 0.1 * math.log(max(rope["factor"], 1.0)) + 1.0
    ratio = None if rope.get("mscale") and rope.get("mscale_all_dim") else usual
    given = rope.get("attention_factor") or ratio
    granted.append((ramp == (32.0, 1.0), "YaRN's beta_fast 32 and beta_slow 1"))
    fits = given is not None and math.isclose(given, usual, rel_tol=1e-4)
    return [*granted, (fits, "YaRN's own factor (attention_factor 0.1 ln(factor) + 1, no mscale)")]


def _granted_of_gemma4(config: PretrainedConfig) -> list[tuple[bool, str]]:
    family, kinds = FAMILIES[config.model_type], list(config.layer_types)
    own = [layer for layer in range(len(kinds)) if not family.reads_keys(config, layer)]
    # of the last two of these, whatever their kinds, llama.cpp takes the first for one under a window
    given = {SLIDING: own[-1] - 1, FULL: own[-1]}
    read = {kind: max(layer for layer in own if kinds[layer] == kind) for kind in kinds[len(own) :]}
    tables = config.vocab_size_per_layer_input == config.vocab_size or not config.hidden_size_per_layer_input
    return [
        (not config.enable_moe_block, "no experts (enable_moe_block), which nybble does not write"),
        (config.use_bidirectional_attention != "all", "attention to earlier tokens alone"),
        (config.hidden_activation == "gelu_pytorch_tanh", "the activation gelu_pytorch_tanh"),
        (not config.attention_bias, "no biases"),
        (SLIDING in kinds, "layers under a window among its layers"),
        (config.rope_parameters[SLIDING]["rope_type"] == "default", "rotary angles without scaling under windows"),
        (
            all(given[kind] == layer for kind, layer in read.items()),
            "layers that read keys of others right behind one under a window and one without, in this order",
        ),
        (tables, "two embeddings of as many tokens (vocab_size_per_layer_input)"),
    ]


def num_experts(config: PretrainedConfig) -> int:
    """Of a layer; 0 where it has none."""
    return getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0


def _is_27b(config: PretrainedConfig) -> bool:
    """As llama.cpp tells Gemma's largest from others, by its number of layers."""
    largest: bool = config.num_hidden_layers == LARGEST[gguf.MODEL_ARCH_NAMES[architecture_of(config)]]
    return largest


def left_out(config: PretrainedConfig) -> str | None:
    """What llama.cpp does without, for the user; None where that is nothing."""
    family = FAMILIES[config.model_type]
    windows = [family.window(config, kind) for kind in family.kinds(config)]
    if ARCHITECTURES[config.model_type] in WINDOWED or not any(windows):
        return None
    return (
        f"llama.cpp attends to all tokens where the model has a window of {max(windows):,}: beyond so many tokens its "
        "answers may be others."
    )


# ---- keys ----------------------------------------------------------------------------------------


def add_hyperparameters(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    """Write the model's name, sizes, norms, rotary angles, and what its architecture has of its own."""
    family, arch = FAMILIES[config.model_type], ARCHITECTURES[config.model_type]
    writer.add_name(str(getattr(config, "_name_or_path", "")).rpartition("/")[2] or config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(_once([_mlp_width(config, layer) for layer in range(config.num_hidden_layers)]))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(_once([_heads(config, kind)[0] for kind in family.kinds(config)]))
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    eps = getattr(config, family.norm_eps)
    (writer.add_layer_norm_eps if family.norm == "layer" else writer.add_layer_norm_rms_eps)(eps)
    writer.add_vocab_size(config.vocab_size)
    rope = rope_of(config)
    writer.add_rope_dimension_count(rotary_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(original_length(config))
    if experts := num_experts(config):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if arch in OWN_KEYS:
        OWN_KEYS[arch](writer, config)


def _once(values: list[int]) -> int | list[int]:
    """One number for all layers where they have the same."""
    return values[0] if len(set(values)) == 1 else values


def _mlp_width(config: PretrainedConfig, layer: int) -> int:
    doubled = getattr(config, "use_double_wide_mlp", False) and FAMILIES[config.model_type].reads_keys(config, layer)
    width: int = config.intermediate_size
    return 2 * width if doubled else width


def _heads(config: PretrainedConfig, kind: str) -> tuple[int, int]:
    """Of layers of a kind: how many heads of keys, and elements of one."""
    own = config.per_layer_config[kind] if ARCHITECTURES[config.model_type] == "GEMMA4" else config
    return own.num_key_value_heads, getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads


def _granite(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _olmo2(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    kinds = FAMILIES[config.model_type].kinds(config)
    if SLIDING in kinds:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == SLIDING for kind in kinds])


def _phi3(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_sliding_window(config.sliding_window or 0)
    rope = rope_of(config)
    if rope["rope_type"] == "longrope":
        scale, original = config.max_position_embeddings / original_length(config), original_length(config)
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        writer.add_rope_scaling_attn_factors(rope.get("attention_factor") or factor)


def _command_r(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_logit_scale(config.logit_scale)


def _cohere2(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_logit_scale(config.logit_scale)
    writer.add_sliding_window(config.sliding_window)


def _gemma2(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _gemma3(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base_swa(config.rope_parameters[SLIDING]["rope_theta"])
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _gemma4(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    _, width = _heads(config, SLIDING)
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([kind == SLIDING for kind in config.layer_types])
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input or 0)
    writer.add_key_length_swa(width)
    writer.add_value_length_swa(width)
    writer.add_rope_dimension_count_swa(width)
    writer.add_rope_freq_base_swa(config.rope_parameters[SLIDING]["rope_theta"])
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _stablelm(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_parallel_residual(config.use_parallel_residual)


def _mistral3(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    rope = rope_of(config)
    if beta := rope.get("llama_4_scaling_beta"):
        writer.add_attn_temperature_scale(beta)
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_yarn_log_mul(rope.get("mscale_all_dim") or 0.0)
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
    else:
        writer.add_rope_scaling_orig_ctx_len(original_length(config))


def _qwen3moe(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _qwen2moe(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


OWN_KEYS: Mapping[str, Callable[[gguf.GGUFWriter, PretrainedConfig], None]] = {
    "GRANITE": _granite,
    "OLMO2": _olmo2,
    "PHI3": _phi3,
    "COMMAND_R": _command_r,
    "COHERE2": _cohere2,
    "GEMMA2": _gemma2,
    "GEMMA3": _gemma3,
    "GEMMA4": _gemma4,
    "STABLELM": _stablelm,
    "MISTRAL3": _mistral3,
    "QWEN2MOE": _qwen2moe,
    "QWEN3MOE": _qwen3moe,
}


# ---- rotary angles -------------------------------------------------------------------------------


def rope_of(config: PretrainedConfig) -> dict[str, Any]:
    """transformers' parameters, of layers without a window where kinds of layers have their own."""
    given = dict(getattr(config, "rope_parameters", None) or {})
    return {"rope_type": "default", "rope_theta": 10000.0} | dict(given.get(FULL, given))


def head_dim(config: PretrainedConfig) -> int:
    """Elements of a head, of layers without a window where kinds of layers have their own."""
    return _heads(config, FULL)[1]


def rotary_dim(config: PretrainedConfig) -> int:
    """Elements of a head that are turned; of proportional angles all, some by nothing."""
    rope = rope_of(config)
    share = 1.0 if ARCHITECTURES[config.model_type] == "GEMMA4" else rope.get("partial_rotary_factor", 1.0)
    return int(head_dim(config) * share)


def original_length(config: PretrainedConfig) -> int:
    """The context that scaled frequencies were made from."""
    length: int = (
        rope_of(config).get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
    )
    return length


def rope_tensors(config: PretrainedConfig) -> dict[str, Tensor]:
    """What llama.cpp divides frequencies by, fp32 `(rotary_dim / 2)`, by the name of the tensor; nothing for most."""
    rope = rope_of(config)
    if rope["rope_type"] == "longrope":
        factors = (torch.tensor(rope[f"{which}_factor"], dtype=torch.float32) for which in ("short", "long"))
        return dict(zip(FACTORS, factors, strict=True))
    if ARCHITECTURES[config.model_type] == "GEMMA4":
        return {FREQUENCIES: proportional_divisors(rope, head_dim(config))}
    if rope["rope_type"] != "llama3":
        return {}
    rope |= {"original_max_position_embeddings": original_length(config)}
    return {FREQUENCIES: llama3_divisors(rope, head_dim(config) // 2).float()}
