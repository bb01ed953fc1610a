"""Command R (docs.cohere.com/docs/command-r): attention and the MLP side by side behind one LayerNorm without bias,
neighbours turned together, a factor on the logits.
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
    unsupported=("use_qk_norm",),
    gguf="COMMAND_R",
)
