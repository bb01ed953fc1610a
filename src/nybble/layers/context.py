"""How many tokens a model takes: its context, and whether anything computes beyond it.

Rotary frequencies give an angle for every position, so such a model computes beyond the length it was made for, if
less well. Learned positions and tables that are computed once end where the context ends.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from nybble.errors import ConfigError
from nybble.layers.dense import input_embedding

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CONTEXT_KEYS = ("max_position_embeddings", "max_seq_len")  # the second is MPT's; other old names are its aliases
TABLE_SLACK = 4  # rows that some tables have before the first position


def context_length(config: "PretrainedConfig | Any") -> int | None:
    """Tokens that a model of this config was made for, prompt and answer together; None where it does not say."""
    text = config.get_text_config()
    found = (getattr(text, key, None) for key in CONTEXT_KEYS)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def fixed_context(model: "PreTrainedModel", config: "PretrainedConfig | Any") -> int | None:
    """Tokens beyond which the model cannot compute; None where it can compute any number.

    Args:
        model: on the meta device is enough.
    """
    context = context_length(config)
    if context is None or (_has_rotary(model) and not _has_table(model, context)):
        return None
    tokens = input_embedding(model)
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    before = (m.padding_idx + 1 for m in tables if m.num_embeddings == context and m.padding_idx is not None)
    return context - max(before, default=0)  # RoBERTa's first rows are no positions


def widest_rows(model: "PreTrainedModel", config: "PretrainedConfig | Any") -> int | None:
    """Tokens that padded rows may be filled up to; 0 where rows hold pictures, None where it is any number."""
    reads_pictures = model.main_input_name == "pixel_values" or hasattr(config, "vision_config")
    return 0 if reads_pictures else fixed_context(model, config)


def within_positions(
    max_seq_len: int, config: "PretrainedConfig | Any", skeleton: "Callable[[], PreTrainedModel]"
) -> int:
    """The max_seq_len that a model can compute: the default is lowered to its positions.

    Args:
        skeleton: gives the model, on the meta device; asked where that matters.

    Raises:
        ConfigError: another max_seq_len was asked for, and the model has no positions for so many tokens.
    """
    from nybble.options.groups import RowOptions  # brings pydantic, which layers do without

    context = context_length(config)
    if context is None or max_seq_len <= context - TABLE_SLACK:
        return max_seq_len
    context = fixed_context(skeleton(), config)
    if context is None or max_seq_len <= context:
        return max_seq_len
    if max_seq_len != RowOptions.model_fields["max_seq_len"].default:
        raise ConfigError(
            f"max-seq-len is {max_seq_len}; the model has positions for {context} tokens.",
            f"Allowed with this model: up to {context}.",
            f"Use --max-seq-len {context}, or leave it out.",
        )
    return context


def _has_rotary(model: nn.Module) -> bool:
    return any(name.rpartition(".")[2].endswith("inv_freq") for name, _ in model.named_buffers())


def _has_table(model: "PreTrainedModel", context: int) -> bool:
    """Whether there is a row for each position: in an embedding beside that of the tokens, or in a buffer."""
    sizes = range(context, context + TABLE_SLACK + 1)
    tokens = input_embedding(model)
    embeddings = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    return any(m.num_embeddings in sizes for m in embeddings) or any(
        buffer.ndim >= 2 and max(buffer.shape) in sizes for buffer in model.buffers()
    )
