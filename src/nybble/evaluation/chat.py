"""A conversation with a model in the terminal, one streamed answer at a time; a run's base can answer beside it."""

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from nybble.data.examples import Message
from nybble.errors import NybbleError
from nybble.generation.generate import Sampling, generate
from nybble.layers.context import context_length
from nybble.layers.convert import adapters_of, enable_adapters
from nybble.options.verbs import ChatConfig
from nybble.runs.open_run import LoadedModel, load_plain, load_run

HELP = (
    "Type a message. /reset forgets what was said, /base shows the base's answers too (again: no more), "
    "/quit leaves, Ctrl-C stops an answer."
)
UNFINISHED = "\ufffd"  # what decoders put for bytes that are no whole character (yet)


def chat(config: ChatConfig, console: Console) -> int:
    """Answer `config.prompt` and return, or converse until the user leaves; returns the exit code."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.run is not None:
        loaded = load_run(config.run, console, config.device, config.compute_dtype)
    else:
        assert config.model is not None  # ChatConfig has seen to it
        loaded = load_plain(config.model, console, config.device, config.compute_dtype)
    torch.manual_seed(config.seed)
    if config.prompt is None:
        return converse(loaded, config, console)
    messages = [*_opening(config), Message("user", config.prompt)]
    answer(loaded, messages, config, console, TextPieces(loaded.template.tokenizer))
    return 0


def converse(loaded: LoadedModel, config: ChatConfig, console: Console) -> int:
    """Answer what the user types until they leave; returns the exit code."""
    console.print(HELP, highlight=False)
    messages, with_base = _opening(config), False
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            console.print(f"\n{HELP}", highlight=False)
            continue
        if line == "/quit":
            return 0
        if line == "/reset":
            messages = _opening(config)
        elif line == "/base":
            with_base = _toggle_base(loaded, with_base, console)
        elif line:
            if with_base:
                _answer_of_base(loaded, [*messages, Message("user", line)], config, console)
            messages = _next_turn(loaded, [*messages, Message("user", line)], config, console)


def _opening(config: ChatConfig) -> list[Message]:
    return [Message("system", config.system)] if config.system else []


def _toggle_base(loaded: LoadedModel, with_base: bool, console: Console) -> bool:
    if not adapters_of(loaded.model):
        console.print("This model has no adapter that could be switched off.", highlight=False)
        return False
    console.print(f"The base's answers are {'no longer' if with_base else 'now'} shown too.", highlight=False)
    return not with_base


def _answer_of_base(loaded: LoadedModel, messages: list[Message], config: ChatConfig, console: Console) -> None:
    """Print what the base would say to the same conversation; it does not become part of it."""
    console.print("base:", style="dim", highlight=False)
    enable_adapters(loaded.model, False)
    try:
        _next_turn(loaded, messages, config, console)
    finally:
        enable_adapters(loaded.model, True)
    console.print("tuned:", style="dim", highlight=False)


def _next_turn(loaded: LoadedModel, messages: list[Message], config: ChatConfig, console: Console) -> list[Message]:
    """The conversation with its answer; without its last message where that got none."""
    pieces = TextPieces(loaded.template.tokenizer)
    try:
        answer(loaded, messages, config, console, pieces)
    except KeyboardInterrupt:
        console.out(f"{pieces.rest()} [stopped]", highlight=False)
    except NybbleError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
    if reply := pieces.text():
        return [*messages, Message("assistant", reply)]
    console.print("No answer, so the message is left out of the conversation.", highlight=False)
    return messages[:-1]


def answer(
    loaded: LoadedModel, messages: Sequence[Message], config: ChatConfig, console: Console, pieces: "TextPieces"
) -> None:
    """Print the answer to a conversation as it comes; `pieces` collects it.

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
        on_token=lambda _, token: console.out(pieces.add(token), end="", highlight=False),
    )
    console.out(pieces.rest(), highlight=False)
    if len(prompt) + len(pieces.ids) == context_length(loaded.model.config):
        console.print("The answer ends where the model's context does.", highlight=False)


class TextPieces:
    """Turns tokens into text as they come, never a part of a character.

    What a token adds depends on the tokens before it (spaces, bytes of one character), so the text of the few
    tokens since the last whole piece is compared with and without the new ones.
    """

    def __init__(self, tokenizer: Any):
        self.ids: list[int] = []
        self._tokenizer = tokenizer
        self._context = 0  # where the tokens begin that are decoded together
        self._shown = 0  # tokens whose text was given out

    def add(self, token: int) -> str:
        """The text that can be shown now, often empty."""
        self.ids.append(token)
        text = self._new_text()
        return "" if text.endswith(UNFINISHED) else self._give(text)

    def rest(self) -> str:
        """What was held back, at the end."""
        return self._give(self._new_text())

    def text(self) -> str:
        """All of it."""
        return self._decode(self.ids).strip()

    def _new_text(self) -> str:
        before = self._decode(self.ids[self._context : self._shown])
        return self._decode(self.ids[self._context :])[len(before) :]

    def _give(self, text: str) -> str:
        if text:
            self._context, self._shown = self._shown, len(self.ids)
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
