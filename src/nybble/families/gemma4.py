"""Gemma 4's text model (ai.google.dev/gemma): Gemma 3 with plain norm weights, values normed too, wider heads in layers
without a window, whose values may be their keys; the last layers read the keys and values of those before them, each
layer is given a part of an embedding of its own, and has a factor on its result.
"""

from dataclasses import replace

from nybble.families.gemma3 import GEMMA3

GEMMA4 = replace(
    GEMMA3,
    model_type="gemma4_text",
    norm_offset=0.0,
    head_norms=("self_attn.q_norm", "self_attn.k_norm", "self_attn.v_norm"),
    shared_keys="num_kv_shared_layers",
    keys_as_values="attention_k_eq_v",
    layer_inputs="hidden_size_per_layer_input",
    layer_input=("per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm"),
    layer_factor="layer_scalar",
    unsupported=("enable_moe_block", ("use_bidirectional_attention", "all")),
    gguf="GEMMA4",
)
