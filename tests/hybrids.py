"""Small models of architectures whose layers carry a state from token to token: one of each kind of layer, random
weights, adapters that are not zero.

`CONFIGS` has a line for each; what rows do, and which layers go into four bits, is tested of all of them.
"""

from pathlib import Path
from typing import Any

import torch
from own_gradients import VOCABULARY
from tiny import make_decoder
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.layers.convert import attach_adapters, quantizable_linears

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DELTA = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 8,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
# The rows of the tests are longer than a chunk of the scan, and no multiple of it.
SSD = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": DELTA,
    "qwen3_next": DELTA | EXPERTS,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": SSD | {"mamba_d_ssm": 64, "head_dim": 8},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
    },
    "bamba": SSD | {"attn_layer_indices": [1]},
    "zamba2": {
        "num_hidden_layers": 2, "layers_block_type": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1],
        "mamba_headdim": 16, "mamba_ngroups": 1, "mamba_d_state": 8, "n_mamba_heads": 4, "chunk_size": 8,
        "attention_hidden_size": 64, "attention_head_dim": 16, "adapter_rank": 8,
    },
    "granitemoehybrid": SSD | {
        "layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1,
        "shared_intermediate_size": 48,
    },
    "mamba": {"state_size": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 8},
}  # fmt: skip


def make_hybrid(folder: Path, name: str) -> Path:
    """A model of such an architecture in fp32 with a tokenizer of bytes, as transformers saves it."""
    return make_decoder(folder, name, **SHAPE | {"max_position_embeddings": 256} | CONFIGS[name])


def hybrid(name: str, dtype: torch.dtype = torch.float32, adapters: bool = True, **more: Any) -> Any:
    """The model, frozen and in eval mode; norms are not all ones, and no matrix of an adapter is zero."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SHAPE | CONFIGS[name] | more)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name and parameter.ndim == 1:
            parameter.data *= 1 + 0.2 * torch.randn_like(parameter)
    if adapters:
        for each in attach_adapters(model, quantizable_linears(model), rank=2, alpha=4.0, seed=1).values():
            nn.init.normal_(each.lora_B, std=0.1)
    return model
