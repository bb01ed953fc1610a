"""StableLM 3B and 2 (arXiv 2402.17834): Llama with LayerNorm, and rotary angles of a quarter of each head; in
StableLM 2 12B attention and the MLP side by side, and queries and keys normed, each head by weights of its own.
"""

from nybble.families.family import Family

STABLELM = Family(
    "stablelm",
    norm="layer",
    norm_eps="layer_norm_eps",
    parallel_option="use_parallel_residual",
    head_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
    head_norms_option="qk_layernorm",
    dropouts=("hidden_dropout",),
    gguf="STABLELM",
)
