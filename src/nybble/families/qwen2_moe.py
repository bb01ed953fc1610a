"""Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671): Qwen2 with experts, and beside them one that every token passes."""

from dataclasses import replace

from nybble.families.family import Mixture
from nybble.families.qwen2 import QWEN2

QWEN2_MOE = replace(
    QWEN2,
    model_type="qwen2_moe",
    mixture=Mixture(
        shared_gate_up=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        shared_down=("mlp.shared_expert.down_proj",),
        shared_weight=("mlp.shared_expert_gate",),
    ),
    gguf="QWEN2MOE",
)
