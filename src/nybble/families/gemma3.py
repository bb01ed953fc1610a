"""Gemma 3's text model (arXiv 2503.19786): Gemma 2 with head norms in place of the soft cap, and one RoPE for layers
under a window, another for the others.
"""

from dataclasses import replace

from nybble.families.gemma2 import GEMMA2

GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    rope_by_kind=True,
    attention_softcap=None,
    gguf="GEMMA3",
)
