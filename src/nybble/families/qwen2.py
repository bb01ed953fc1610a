"""Qwen2 and Qwen2.5 (arXiv 2407.10671): biases on q, k and v; windows in some layers, where the config has one."""

from nybble.families.family import Family

QWEN2 = Family("qwen2", windows="by kind", gguf="QWEN2")
