"""Mistral (arXiv 2310.06825): Llama with a window over all layers, where the config has one."""

from nybble.families.family import Family

MISTRAL = Family("mistral", windows="all", gguf="LLAMA", gguf_neighbours=True)
