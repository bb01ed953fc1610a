"""Llama (arXiv 2302.13971), and the many models that say they are one."""

from nybble.families.family import Family

LLAMA = Family("llama", gguf="LLAMA", gguf_neighbours=True)
