"""Which models GGUF export takes, under which names; what llama.cpp makes of them is asked in test_llama_cpp.py."""

import copy

import pytest
import torch
from family_models import CONFIGS
from tiny_families import MIXTURES, tiny_config
from transformers import AutoModelForCausalLM, PretrainedConfig

from nybble.errors import ExportError
from nybble.exporting.gguf_keys import ARCHITECTURES, architecture_of, check_family, left_out, rope_tensors
from nybble.formats.gguf import gguf_names

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
SCALED_WINDOWS = {
    "full_attention": {"rope_type": "proportional", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
}


def config_of(name: str) -> PretrainedConfig:
    return tiny_config(name) if name in MIXTURES else copy.deepcopy(CONFIGS[name])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_has_a_name_of_its_own(name: str) -> None:
    config = config_of(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = gguf_names(model, architecture_of(config))
    stored = model.state_dict().keys() - (set(model.all_tied_weights_keys) if config.tie_word_embeddings else set())
    parts = [part for found in names.values() for part in found]
    assert names.keys() >= stored and len(set(parts)) == len(parts)


@pytest.mark.parametrize(
    ("name", "options", "allowed"),
    [
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, "rotary angles in all layers but every 4th"),
        ("smollm3", {"no_rope_layers": [1, 1, 1]}, "no windows"),
        ("cohere2", {}, "windows in all layers but one of 4"),
        ("gemma2", {}, "query_pre_attn_scalar 18"),
        ("gemma2", {"query_pre_attn_scalar": 18, "final_logit_softcapping": None}, "soft caps on scores and logits"),
        ("gemma3_text", {}, "windows in all layers but one of 6"),
        ("phi, normed heads", {}, "no norms of queries and keys"),
        ("gemma4_text", {"enable_moe_block": True}, "no experts"),
        ("gemma4_text", {"attention_bias": True}, "no biases"),
        ("gemma4_text", {"hidden_activation": "silu"}, "the activation gelu_pytorch_tanh"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "earlier tokens alone"),
        ("gemma4_text", {"vocab_size_per_layer_input": 100}, "two embeddings of as many tokens"),
        ("gemma4_text", {"num_kv_shared_layers": 1}, "right behind one under a window and one without"),
        ("gemma4_text", {"layer_types": ["full_attention"] * 4}, "layers under a window among its layers"),
        ("gemma4_text", {"rope_parameters": SCALED_WINDOWS}, "rotary angles without scaling under windows"),
        ("gemma4_text", {"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, "default, proportional"),
        ("cohere", {"tie_word_embeddings": False}, "tied to the embedding"),
        ("olmo2", {"tie_word_embeddings": True}, "not tied to the embedding"),
        ("starcoder2", {"head_dim": 32}, "as wide as the hidden states"),
        ("granite", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "linear, yarn"),
        ("llama", {"rope_parameters": YARN | {"beta_fast": 8.0}}, "beta_fast 32 and beta_slow 1"),
        ("llama", {"rope_parameters": YARN | {"attention_factor": 1.0}}, "YaRN's own factor"),
        ("llama", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}, "YaRN's own factor"),
        ("ministral3", {"rope_parameters": YARN | {"truncate": False}}, "between whole dimensions"),
        ("ministral", {}, "does not know the model type 'ministral'"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob true"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "experts in all layers"),
        ("qwen2_moe", {"tie_word_embeddings": True}, "not tied to the embedding"),
        ("olmoe", {"clip_qkv": 8.0}, "no clip_qkv"),
        ("olmoe", {"num_key_value_heads": 2}, "as many heads of keys as of queries"),
        ("mixtral", {"hidden_act": "gelu"}, "the activation silu"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name: str, options: dict[str, object], allowed: str) -> None:
    config = config_of(name)
    for option, value in options.items():
        setattr(config, option, value)
    with pytest.raises(ExportError, match=allowed):
        check_family(config)


def test_yarn_s_own_factor_may_be_spelled_out() -> None:
    config = config_of("llama")
    config.rope_parameters = YARN | {"attention_factor": 1.1386294, "beta_fast": 32, "beta_slow": 1}
    check_family(config)


def test_windows_that_llama_cpp_does_without_are_named() -> None:
    assert "a window of 5" in (left_out(CONFIGS["phi3"]) or "")
    assert left_out(CONFIGS["olmo3"]) is None and left_out(CONFIGS["llama"]) is None


def test_both_sets_of_factors_of_longrope_are_written() -> None:
    config = copy.deepcopy(CONFIGS["phi3"])
    config.rope_parameters = {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
    found = {name: factors.tolist() for name, factors in rope_tensors(config).items()}
    assert found == {"rope_factors_long.weight": [3.0, 4.0], "rope_factors_short.weight": [1.0, 2.0]}
