"""Granite 3 (ibm.com/granite): Llama with factors on embeddings, scores, what is added to the states, and logits."""

from nybble.families.family import Family

GRANITE = Family(
    "granite",
    embedding_multiplier="embedding_multiplier",
    residual_multiplier="residual_multiplier",
    gguf="GRANITE",
    gguf_neighbours=True,
)
