"""Shapes of published models, by name: the config.json that the arithmetic and `nybble synth` need, no weights."""

from typing import Any

_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _llama(
    hidden: int, layers: int, heads: int, kv_heads: int, width: int, vocabulary: int, **others: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": width,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    } | others


def _qwen3_30b(layers: int) -> dict[str, Any]:
    """Qwen3-30B-A3B, or its first layers."""
    return _llama(
        2048, layers, 32, 4, 6144, 151936, model_type="qwen3_moe", head_dim=128, moe_intermediate_size=768,
        num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, decoder_sparse_step=1, rms_norm_eps=1e-6,
        max_position_embeddings=40960, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-70b": _llama(8192, 80, 64, 8, 28672, 32000),
    "llama-65b": _llama(8192, 80, 64, 64, 22016, 32000, max_position_embeddings=2048),
    "llama-3-8b": _llama(
        4096, 32, 32, 8, 14336, 128256, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "mixtral-8x7b": _llama(
        4096, 32, 32, 8, 14336, 32000, model_type="mixtral", num_local_experts=8, num_experts_per_tok=2,
        max_position_embeddings=32768, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "qwen3-30b-a3b": _qwen3_30b(48),
    "qwen3-30b-a3b-8-layers": _qwen3_30b(8),
    "llama-3.2-1b": _llama(
        2048, 16, 32, 8, 8192, 128256, max_position_embeddings=131072, head_dim=64, tie_word_embeddings=True,
        rope_parameters=_LLAMA_3_ROPE | {"factor": 32.0},
    ),
    "smollm2-360m": _llama(960, 32, 15, 5, 2560, 49152, max_position_embeddings=8192, tie_word_embeddings=True),
    "smollm2-135m": _llama(576, 30, 9, 3, 1536, 49152, max_position_embeddings=8192, tie_word_embeddings=True),
    "tiny": _llama(256, 4, 4, 2, 512, 1024, tie_word_embeddings=True),
}  # fmt: skip
