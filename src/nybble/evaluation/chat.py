"""Answers to a conversation, as they come."""

from collections.abc import Callable, Sequence

import torch

from nybble.data.examples import Example, Message
from nybble.data.turn_pictures import with_pictures
from nybble.data.turns import read_turns
from nybble.events import Listener, silent
from nybble.generation.generate import Sampling, generate
from nybble.generation.text_pieces import TextPieces
from nybble.layers.context import context_length
from nybble.layers.dense import is_encoder_decoder
from nybble.options.use_groups import AnswerOptions
from nybble.options.verbs import ChatConfig
from nybble.runs.open_run import LoadedModel, load_plain, load_run


def load_chat(config: ChatConfig, report: Listener = silent) -> LoadedModel:
    """The run or the model to talk to; the seed is set."""
    asked = config.model
    if asked.run is not None:
        loaded = load_run(asked.run, config.machine, report)
    else:
        assert asked.model is not None  # AnsweringModel has seen to it
        loaded = load_plain(asked.model, config.machine, report, pictures=bool(config.answers.image))
    torch.manual_seed(config.answers.seed)
    return loaded


def opening(system: str | None) -> list[Message]:
    """What stands before the first question."""
    return [Message("system", system)] if system else []


def with_images(words: str, files: Sequence[str]) -> Message:
    """What a user says, with pictures before it.

    Args:
        files: paths from where the command runs.

    Raises:
        RowError: a file is not there, or would have to be fetched.
    """
    if not files:
        return Message("user", words)
    parts = [*({"type": "image", "image": file} for file in files), {"type": "text", "text": words}]
    turns = read_turns([{"role": "user", "content": parts}], "messages", "the message", pictures=True)
    return with_pictures(Example("the message", turns), {}, None).conversation()[0]


def answer(
    loaded: LoadedModel, messages: Sequence[Message], how: AnswerOptions, pieces: TextPieces, say: Callable[[str], None]
) -> bool:
    """Answer a conversation; returns whether the answer ends because the model's context does.

    Args:
        pieces: collects the answer, and holds it where this is interrupted.
        say: given its text as it comes, but for what `pieces` holds back at the end.

    Raises:
        DataError: the conversation does not fit into the model's context, or the template refuses it.
    """
    prompt, beside = loaded.template.asked(messages)
    generate(
        loaded.model,
        [prompt],
        stop_ids=loaded.template.stop_ids,
        max_new_tokens=how.max_new_tokens,
        sampling=Sampling(how.temperature, how.top_p, how.top_k),
        on_token=lambda _, token: say(pieces.add(token)),
        beside=beside,
    )
    read = 0 if is_encoder_decoder(loaded.model) else len(prompt)  # by another part than writes
    return read + len(pieces.ids) == context_length(loaded.model.config)
