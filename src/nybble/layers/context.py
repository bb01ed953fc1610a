"""How many tokens a model takes: its context, and whether anything computes beyond it.

Rotary frequencies give an angle for every position, so such a model computes beyond the length it was made for, if
less well. Learned positions and tables that are computed once end where the context ends.
"""

from typing import TYPE_CHECKING, Any

from torch import nn

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
    return context


def _has_rotary(model: nn.Module) -> bool:
    return any(name.rpartition(".")[2].endswith("inv_freq") for name, _ in model.named_buffers())


def _has_table(model: "PreTrainedModel", context: int) -> bool:
    """Whether there is a row for each position: in an embedding beside that of the tokens, or in a buffer."""
    sizes = range(context, context + TABLE_SLACK + 1)
    tokens = model.get_input_embeddings()
    embeddings = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    return any(m.num_embeddings in sizes for m in embeddings) or any(
        buffer.ndim >= 2 and max(buffer.shape) in sizes for buffer in model.buffers()
    )
