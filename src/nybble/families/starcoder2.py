"""StarCoder2 (arXiv 2402.19173): LayerNorm, an MLP without a gate as GPT-2 has it, biases, a window over all layers."""

from nybble.families.family import Family

STARCODER2 = Family(
    "starcoder2",
    activation="gelu_pytorch_tanh",
    gated=False,
    norm="layer",
    norm_eps="norm_epsilon",
    gate_up=("mlp.c_fc",),
    down="mlp.c_proj",
    windows="all",
    dropouts=("residual_dropout", "embedding_dropout"),
    gguf="STARCODER2",
)
