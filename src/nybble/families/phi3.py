"""Phi-3 and Phi-4 (arXiv 2404.14219, 2412.08905): Llama with one linear layer for q, k and v, and one for gate and up;
rotary angles of a part of each head in some.
"""

from nybble.families.family import Family

PHI3 = Family(
    "phi3",
    qkv=("self_attn.qkv_proj",),
    gate_up=("mlp.gate_up_proj",),
    windows="all",
    dropouts=("resid_pdrop",),
    gguf="PHI3",
)
