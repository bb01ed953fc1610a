"""Which models end where their context ends, asked of tiny ones of several kinds."""

from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from nybble.errors import ConfigError
from nybble.layers.context import context_length, fixed_context
from nybble.options.groups import RowOptions
from nybble.runs.context import within_context
from nybble.sources.skeleton import build_skeleton

SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT = {"vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 2}
CONFIGS = {
    "gpt2": (GPT | {"n_positions": 48}, 48),
    "gptj": (GPT | {"n_positions": 48, "rotary_dim": 8}, 48),  # rotary, from a table
    "opt": (SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 32, "max_position_embeddings": 48}, 48),
    "mpt": ({"vocab_size": 300, "d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 48}, 48),
    "roberta": (SIZES | {"intermediate_size": 32, "max_position_embeddings": 48, "pad_token_id": 1}, 46),
    "llama": (SIZES | {"intermediate_size": 32, "max_position_embeddings": 48}, None),
    "bloom": ({"vocab_size": 300, "hidden_size": 32, "n_layer": 1, "n_head": 2}, None),
    "mamba": ({"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1}, None),
}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_positions_that_end(model_type: str) -> None:
    values, fixed = CONFIGS[model_type]
    config = AutoConfig.for_model(model_type, **values)
    assert fixed_context(build_skeleton(config), config) == fixed
    assert context_length(config) == (None if model_type in ("bloom", "mamba") else 48)


def test_the_default_length_is_lowered_and_another_is_refused() -> None:
    configs = [AutoConfig.for_model(name, **CONFIGS[name][0]) for name in ("gpt2", "llama")]
    learned, rotary = (SimpleNamespace(config=config, skeleton=build_skeleton(config)) for config in configs)
    default = RowOptions().max_seq_len
    assert within_context(default, learned) == 48
    assert within_context(default, rotary) == default and within_context(512, rotary) == 512
    with pytest.raises(ConfigError, match="positions for 48 tokens"):
        within_context(512, learned)
