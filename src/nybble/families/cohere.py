"""Command R (docs.cohere.com/docs/command-r): attention and the MLP side by side behind one LayerNorm without bias,
neighbours turned together, a factor on the logits; in Command R+ queries and keys normed, each head by its own weights.
"""

from nybble.families.family import Family

COHERE = Family(
    "cohere",
    norm="layer",
    norm_eps="layer_norm_eps",
    mlp_norm="input_layernorm",
    parallel=True,
    rope_neighbours=True,
    angles_in_pairs=True,
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    head_norms_option="use_qk_norm",
    gguf="COMMAND_R",
)
