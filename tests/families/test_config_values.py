"""Values that a family's configs may have, one changed at a time: decoder blocks compute what transformers' own layers
do with them, or leave the model to these.
"""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from family_models import CONFIGS, MIXTURES, adapted_in, by_blocks, by_transformers, packed_batch, relative_error
from tiny import put_into_four_bits, tune
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from nybble.errors import FormatError
from nybble.families import FAMILIES
from nybble.layers.backbone import why_not_blocks
from nybble.layers.rotary import length_of_change

LEFT_OUT = {  # what says nothing of layers, or is another test's
    *("vocab_size", "vocab_size_per_layer_input", "architectures", "dtype", "transformers_version", "model_type"),
    *("id2label", "label2id", "num_labels", "problem_type", "tie_word_embeddings", "use_cache", "return_dict"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "initializer_range", "output_hidden_states"),
    *("output_attentions", "chunk_size_feed_forward", "is_encoder_decoder", "_name_or_path", "num_hidden_layers"),
}
ROPES = (
    {"rope_theta": 500.0}, {"partial_rotary_factor": 0.5}, {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16},
)  # fmt: skip


def others(option: str, value: Any) -> Iterator[Any]:
    """Other values of an option."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value * 2, 0 * value, value + 1)
    elif value is None:
        yield from (True, 2, 0.5)
    elif option == "layer_types":
        yield from (["full_attention"] * len(value), ["sliding_attention"] * len(value))
    elif isinstance(value, str) and "act" in option:
        yield from ("gelu", "relu", "silu")
    elif isinstance(value, dict) and "full_attention" in value:
        yield {kind: rope | {"rope_theta": 3 * rope["rope_theta"]} for kind, rope in value.items()}
    elif isinstance(value, dict) and "rope_theta" in value:
        yield from (value | rope for rope in ROPES)
    elif isinstance(value, list):
        yield [1 - each if each in (0, 1) else each for each in value]


def model_of(name: str, config: PretrainedConfig) -> PreTrainedModel:
    """In four bits with adapters that do something; norms are not all ones."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter_name, parameter in model.named_parameters():
        is_norm = "norm" in parameter_name and parameter_name.endswith("weight")
        mean = 1.0 - FAMILIES[config.model_type].norm_offset if is_norm else 0.0
        nn.init.normal_(parameter, mean=mean, std=0.2)
        if config.model_type == "gemma4_text" and parameter_name.endswith("q_norm.weight"):
            parameter.data.mul_(0.3)  # its scores have no factor of their own
    put_into_four_bits(model)
    return tune(model, adapted_in(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CONFIGS, *MIXTURES])
def test_a_value_is_computed_as_transformers_does_or_left_to_it(name: str) -> None:
    config, batch, equal = (CONFIGS | MIXTURES)[name], packed_batch(), 0
    written = config.to_dict()
    for option in written.keys() - LEFT_OUT:
        for value in others(option, written[option]):
            try:
                changed = type(config)(**copy.deepcopy(written) | {option: value})
                changed._attn_implementation = "eager" if "gemma" in name else "sdpa"
                model = model_of(name, changed)
                states, loss, gradients = by_transformers(model, batch)
            except Exception:  # transformers does not take it, with whatever its code runs into
                continue
            learns = all(bool(each.isfinite().all() and each.any()) for each in (gradients, states))
            refused = why_not_blocks(model, packing=True, dropout=False) is not None
            if refused or not learns or length_of_change(model) is not None:  # of these the model itself is asked
                continue
            try:
                ours = by_blocks(model, batch, "everything")
            except FormatError:  # an op says what it does not take
                continue
            assert relative_error(ours[0], states) < 2e-4, (option, value)
            assert abs(ours[1] - loss) < 1e-3 and relative_error(ours[2], gradients) < 2e-3, (option, value)
            equal += 1
    assert equal > 5, "some values were compared"
