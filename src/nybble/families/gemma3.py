"""Gemma 3's text model (arXiv 2503.19786): Gemma 2 with head norms in place of the soft cap, and one RoPE for layers
under a window, another for the others.
"""

from nybble.families.family import Family

GEMMA3 = Family(
    "gemma3_text",
    activation="gelu_pytorch_tanh",
    activation_option="hidden_activation",
    norm_offset=1.0,
    mlp_norm="pre_feedforward_layernorm",
    attention_output_norm="post_attention_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    windows="by kind",
    rope_by_kind=True,
    off=("use_bidirectional_attention",),
)
