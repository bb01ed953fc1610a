"""Qwen3-MoE (arXiv 2505.09388), as Qwen3-30B-A3B: Qwen3 with experts, in all layers or in some; a window over all."""

from dataclasses import replace

from nybble.families.family import Mixture
from nybble.families.qwen3 import QWEN3

QWEN3_MOE = replace(QWEN3, model_type="qwen3_moe", windows="all", mixture=Mixture(), gguf="QWEN3MOE")
