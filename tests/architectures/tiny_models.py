"""A tiny random causal language model of any `model_type` of transformers: its default config, made small by rule."""

import re
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 300
MOST_PARAMETERS = 12_000_000
LAYER_COUNTS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")

# What a number of the config becomes, by its name: the first rule that matches. None leaves it.
RULES: list[tuple[str, int | None]] = [
    (r"^rotary_dim$", 8),
    (r"^qk_head_dim$", 32),  # qk_nope_head_dim + qk_rope_head_dim
    (r"^dim_head$", 16),
    (r"^dim_ff$", 96),
    (r"mamba_n_heads|n_mamba_heads|mamba_num_heads", 8),
    (r"tie_|_std$|_range$|_eps(ilon)?$|dropout|_theta$|^rope|_type_ids$", None),
    (r"position_embedding_type|output_", None),
    (r"(^|_)vocab_size$|vocab_size_per_layer_input|^vocab_size_", VOCABULARY),
    (r"max_position_embeddings|^n_positions$|^max_seq_len$|^n_ctx$|^context_length$|max_sequence_length", 64),
    (r"(sliding|attention|local_attention|window|chunk)_(window|size|chunk_size|length)(_size)?$|^window_size$", 16),
    (r"chunk_size|chunk_length", 16),
    (r"num_experts_per_tok|^moe_topk$|^moe_k$|^top_?k(_experts)?$|num_selected_experts|experts_per_token", 2),
    (r"n_group$|topk_group|n_groups$|num_groups$|mamba_n_groups|num_expert_group", 1),
    (r"n_shared_experts|num_shared_experts", 1),
    (r"(num|n)_.*experts$|^num_experts$|^n_experts$|^moe_num_experts$", 4),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_kv_shared_layers|num_nextn", 0),
    (r"(q_lora_rank|kv_lora_rank)", 16),
    (
        r"(qk_rope_head_dim|qk_nope_head_dim|v_head_dim|index_head_dim|.*head_dim$|d_kv$|attention_head_size|d_head$|kv_channels)",
        16,
    ),
    (r"(state_size|d_state|ssm_state_size|mamba_d_state)", 8),
    (
        r"num_(key_value|kv|kv_attention)_heads|n_kv_heads?|num_key_value_groups|attention_kv_heads|linear_num_key_heads",
        2,
    ),
    (r"num_.*heads$|n_heads?$|.*attention_heads$|linear_num_value_heads", 4),
    (
        r"(intermediate_size|ffn_dim|n_inner|d_ff|inner_dim|feed_forward_proj_dim|ffn_hidden_size|conv_dim$|.*_ffn_dim)$",
        96,
    ),
    (
        r"(hidden_size|d_model|n_embd|embed_dim|embedding_size|lru_width|dim|width)$|word_embed_proj_dim|hidden_size_(per_layer_input|global)",
        64,
    ),
    (r"(num_.*layers|n_layers?|num_layers|.*_layers|depth)$", 2),
]


def tiny_config(model_type: str) -> PretrainedConfig:
    """The default config of `model_type`, and every config within it, made small by RULES and OVERRIDES."""
    return _shrunk(CONFIG_MAPPING[model_type]())


def _shrunk(config: PretrainedConfig) -> PretrainedConfig:
    values = config.to_dict()
    for name in ("transformers_version", "model_type", "architectures"):
        values.pop(name, None)
    count = next((values[name] for name in LAYER_COUNTS if isinstance(values.get(name), int)), 0)
    kept = _kept_layers(values, count)
    for name, value in list(values.items()):
        inner = vars(config).get(name)
        if isinstance(inner, PretrainedConfig):
            values[name] = _shrunk(inner)
        elif name == "per_layer_config":
            values[name] = {
                kept.index(int(layer)): _small_all(own) for layer, own in value.items() if int(layer) in kept
            }
        elif name == "head_dim" and value is None:
            values[name] = 16
        elif isinstance(value, list) and len(value) == count:
            values[name] = [_small(name, value[layer]) for layer in kept]
        elif name in LAYER_COUNTS:
            values[name] = len(kept)
        else:
            values[name] = _small(name, value)
    if "kv_lora_rank" in values:  # latent attention has no groups of heads
        values["num_key_value_heads"] = values["num_attention_heads"]
    return type(config)(**values | OVERRIDES.get(config.model_type, {}))


def _kept_layers(values: dict[str, Any], count: int) -> list[int]:
    """One layer of each kind, at least two and four at most."""
    kinds = [value for value in values.values() if isinstance(value, list) and len(value) == count]
    seen = list(dict.fromkeys(zip(*map(_texts, kinds), strict=True))) if kinds else []
    of_layer = list(zip(*map(_texts, kinds), strict=True))
    first = [of_layer.index(kind) for kind in seen][:4]
    return sorted(set(first) | {0, 1}) if len(first) < 2 else first


def _small_all(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _small(name, value) for name, value in values.items()}


def _texts(values: list[Any]) -> list[str]:
    return [str(value) for value in values]


def _small(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name.endswith(("_token_id", "_token_index", "_token_ids", "pad_token", "_id")):
        return value % VOCABULARY
    for pattern, small in RULES:
        if re.search(pattern, name):
            return value if small is None else min(value, small)
    return value


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# What no rule can know: sizes that must agree with others, and defaults that transformers leaves out.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": VOCABULARY,
        "ple_embed_dim": 64,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "hybrid_layer_ids": [1],
        "mamba_headdim": 16,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
}


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def all_types() -> list[str]:
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
