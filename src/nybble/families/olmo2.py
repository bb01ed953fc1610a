"""OLMo 2 (arXiv 2501.00656): norms of what attention and the MLP add in place of those of what they read; queries and
keys normed over all heads.
"""

from nybble.families.family import Family

OLMO2 = Family(
    "olmo2",
    input_norm=None,
    mlp_norm=None,
    attention_output_norm="post_attention_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    heads_together=True,
    gguf="OLMO2",
)
