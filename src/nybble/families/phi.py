"""Phi-1, 1.5 and 2 (arXiv 2309.05463): attention and an MLP without a gate side by side behind one LayerNorm, biases
everywhere, rotary angles of a part of each head.
"""

from nybble.families.family import Family

PHI = Family(
    "phi",
    activation="gelu_new",
    gated=False,
    norm="layer",
    norm_eps="layer_norm_eps",
    final_norm="final_layernorm",
    mlp_norm="input_layernorm",
    parallel=True,
    head_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
    head_norms_option="qk_layernorm",
    o="self_attn.dense",
    gate_up=("mlp.fc1",),
    down="mlp.fc2",
    dropouts=("resid_pdrop", "embd_pdrop"),
    gguf="PHI2",
)
