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
from nybble.formats.gguf import llama3_divisors

ARCHITECTURES = {name: family.gguf for name, family in FAMILIES.items() if family.gguf}
READABLE = ("LLAMA", "QWEN2", "QWEN3", "QWEN2MOE", "QWEN3MOE", "OLMOE")  # those that nybble reads (formats/gguf.py)
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
NO_ROPE_EVERY = 4  # which layer has no rotary angles in SmolLM3
FULL_EVERY = {"COHERE2": 4, "GEMMA2": 2, "GEMMA3": 6}  # which layer has no window
NORMED_ROUTING = {"QWEN2MOE": False, "QWEN3MOE": True, "OLMOE": False}  # norm_topk_prob
WINDOWED = ("OLMO2", *FULL_EVERY)  # architectures whose windows llama.cpp knows


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
    rope, known = rope_of(config), (*ROPE_TYPES, *(["longrope"] if ARCHITECTURES[config.model_type] == "PHI3" else []))
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
    if arch in NORMED_ROUTING:
        normed = NORMED_ROUTING[arch]
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
    return granted


def num_experts(config: PretrainedConfig) -> int:
    """Of a layer; 0 where it has none."""
    return getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0


def _is_27b(config: PretrainedConfig) -> bool:
    """As llama.cpp tells Gemma's largest from others, by its number of layers."""
    largest: bool = config.num_hidden_layers == {"gemma2": 46, "gemma3_text": 62}[config.model_type]
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
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
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
    """Elements of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotary_dim(config: PretrainedConfig) -> int:
    """Elements of a head that are turned."""
    return int(head_dim(config) * rope_of(config).get("partial_rotary_factor", 1.0))


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
        return {
            f"rope_factors_{which}.weight": torch.tensor(rope[f"{which}_factor"], dtype=torch.float32)
            for which in ("long", "short")
        }
    if rope["rope_type"] != "llama3":
        return {}
    rope |= {"original_max_position_embeddings": original_length(config)}
    return {"rope_freqs.weight": llama3_divisors(rope, head_dim(config) // 2).float()}
