"""Mixtral (arXiv 2401.04088): Mistral with eight experts in each layer, of which a token passes two."""

from nybble.families.family import Family, Mixture

MIXTRAL = Family(
    "mixtral", windows="all", dropouts=("router_jitter_noise",), mixture=Mixture(), gguf="LLAMA", gguf_neighbours=True
)
