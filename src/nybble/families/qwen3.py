"""Qwen3, the dense ones (arXiv 2505.09388): each query and key head is normed."""

from nybble.families.family import Family

QWEN3 = Family("qwen3", head_norms=("self_attn.q_norm", "self_attn.k_norm"), windows="by kind", gguf="QWEN3")
