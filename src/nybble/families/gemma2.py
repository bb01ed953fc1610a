"""Gemma 2 (arXiv 2408.00118): GeGLU, four norms a layer with weights around zero, scores under a soft cap, every other
layer under a window.
"""

from nybble.families.family import Family

GEMMA2 = Family(
    "gemma2",
    activation="gelu_pytorch_tanh",
    activation_option="hidden_activation",
    norm_offset=1.0,
    mlp_norm="pre_feedforward_layernorm",
    attention_output_norm="post_attention_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
    windows="by kind",
    attention_softcap="attn_logit_softcapping",
    unsupported=("use_bidirectional_attention",),
    gguf="GEMMA2",
)
