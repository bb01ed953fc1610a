"""OLMoE (arXiv 2409.02060): queries and keys normed over all heads, 64 experts in each layer."""

from nybble.families.family import Family, Mixture

OLMOE = Family(
    "olmoe",
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    heads_together=True,
    unsupported=("clip_qkv",),
    mixture=Mixture(),
    gguf="OLMOE",
)
