"""Answers to a conversation, as they come."""

from collections.abc import Callable, Sequence

import torch

from nybble.data.examples import Message
from nybble.events import Listener, silent
from nybble.generation.generate import Sampling, generate
from nybble.generation.text_pieces import TextPieces
from nybble.layers.context import context_length
from nybble.options.verbs import ChatConfig
from nybble.runs.open_run import LoadedModel, load_plain, load_run


def load_chat(config: ChatConfig, report: Listener = silent) -> LoadedModel:
    """The run or the model to talk to; the seed is set."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.run is not None:
        loaded = load_run(config.run, config.device, config.compute_dtype, report)
    else:
        assert config.model is not None  # ChatConfig has seen to it
        loaded = load_plain(config.model, config.device, config.compute_dtype, report)
    torch.manual_seed(config.seed)
    return loaded


def opening(config: ChatConfig) -> list[Message]:
    """What stands before the first question."""
    return [Message("system", config.system)] if config.system else []


def answer(
    loaded: LoadedModel, messages: Sequence[Message], config: ChatConfig, pieces: TextPieces, say: Callable[[str], None]
) -> bool:
    """Answer a conversation; returns whether the answer ends because the model's context does.

    Args:
        pieces: collects the answer, and holds it where this is interrupted.
        say: given its text as it comes, but for what `pieces` holds back at the end.

    Raises:
        DataError: the conversation does not fit into the model's context, or the template refuses it.
    """
    prompt = loaded.template.encode_prompt(messages)
    generate(
        loaded.model,
        [prompt],
        stop_ids=loaded.template.stop_ids,
        max_new_tokens=config.max_new_tokens,
        sampling=Sampling(config.temperature, config.top_p, config.top_k),
        on_token=lambda _, token: say(pieces.add(token)),
    )
    return len(prompt) + len(pieces.ids) == context_length(loaded.model.config)
