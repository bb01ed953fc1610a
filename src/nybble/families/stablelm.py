"""StableLM 3B and 2 (arXiv 2402.17834): Llama with LayerNorm, and rotary angles of a quarter of each head."""

from nybble.families.family import Family

STABLELM = Family(
    "stablelm",
    norm="layer",
    norm_eps="layer_norm_eps",
    dropouts=("hidden_dropout",),
    unsupported=("use_parallel_residual", "qk_layernorm"),
    gguf="STABLELM",
)
