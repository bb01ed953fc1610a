"""SmolLM3 (huggingface.co/blog/smollm3): Llama whose every fourth layer has no rotary angles (arXiv 2501.18795)."""

from nybble.families.family import Family

SMOLLM3 = Family("smollm3", windows="by kind", rotated_layers="no_rope_layers", gguf="SMOLLM3", gguf_neighbours=True)
