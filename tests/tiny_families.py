"""Tiny real models of each family, written by transformers, for the tests of sources and of quantisation."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

VOCABULARY = 160
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}

CLASSES = {
    "llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config,
    "mixtral": MixtralConfig, "qwen2_moe": Qwen2MoeConfig, "qwen3_moe": Qwen3MoeConfig, "olmoe": OlmoeConfig,
    "smollm3": SmolLM3Config, "granite": GraniteConfig, "phi3": Phi3Config, "ministral3": Ministral3Config,
    "gemma2": Gemma2Config, "gemma3_text": Gemma3TextConfig, "gemma4_text": Gemma4TextConfig,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
EXTRA = {  # norm_topk_prob is what llama.cpp takes for granted of each
    "qwen3": {"head_dim": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": EXPERTS | {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 96},
    "qwen3_moe": EXPERTS | {"moe_intermediate_size": 96, "head_dim": 16, "norm_topk_prob": True},
    "olmoe": EXPERTS | {"pad_token_id": None, "num_key_value_heads": 4},
    "smollm3": {"num_hidden_layers": 5, "pad_token_id": None},
    "granite": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.625, "attention_multiplier": 0.25, "logits_scaling": 1.5,
    },
    "phi3": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "pad_token_id": None, "tie_word_embeddings": False,
    },
    "ministral3": {
        "head_dim": 16, "pad_token_id": None, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
            "beta_fast": 8.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.5,
        },
    },
    "gemma2": {
        "num_hidden_layers": 3, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5, "pad_token_id": None,
        "attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0,
    },
    "gemma3_text": {
        "num_hidden_layers": 7, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5, "pad_token_id": None,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        },
    },
    "gemma4_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 5,
        "head_dim": 16, "global_head_dim": 32, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCABULARY, "final_logit_softcapping": 4.0,
        "pad_token_id": None,
    },
}  # fmt: skip
MIXTURES = {"mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "olmoe": "olmoe"}  # and in GGUF files


def tiny_config(family: str, **overrides: object) -> PretrainedConfig:
    if family == "gpt2":
        shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
        return GPT2Config(**shape, bos_token_id=0, eos_token_id=1, **overrides)
    return CLASSES[family](**(SHAPE | EXTRA.get(family, {}) | {"bos_token_id": 0, "eos_token_id": 1} | overrides))


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., tuple[Path, PreTrainedModel]]:
    """Writes a seeded tiny model with a tokenizer as transformers does; returns the folder and the model."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "5GB", **overrides: object):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).eval()
        for name, parameter in model.named_parameters():  # norms of ones and biases of zeros would hide mistakes
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
            parameter.data = parameter.data.to(dtype)  # not model.to, which would round the rotary frequencies too
        set_layer_factors(model, dtype)
        folder = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder, max_shard_size=shard)
        save_tokenizer(folder)
        return folder, model

    return make


def set_layer_factors(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give Gemma 4's layers factors that show."""
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.data = buffer.uniform_(0.6, 1.4).to(dtype)


def save_tokenizer(folder: Path) -> None:
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w0", eos_token="w1", unk_token="w2")
    wrapped.save_pretrained(folder)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
