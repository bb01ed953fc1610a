"""A conversation with a tuned model in the terminal, one streamed answer at a time."""

from collections.abc import Sequence

import torch
from rich.console import Console
from transformers import TextStreamer

from nybble.config import ChatConfig
from nybble.data.examples import Message
from nybble.data.template import ChatTemplate
from nybble.evaluation.generate import generate
from nybble.evaluation.load_run import LoadedRun, load_run

HELP = "Type a message. /reset forgets the conversation, /quit or Ctrl-D leaves."


def chat(config: ChatConfig, console: Console) -> int:
    """Answer `config.prompt` and return, or converse until the user leaves; returns the exit code."""
    loaded = load_run(config.run, console, config.device, config.compute_dtype)
    torch.manual_seed(config.seed)
    if config.prompt is not None:
        answer(loaded, [Message("user", config.prompt)], config.max_new_tokens, config.temperature)
        return 0
    console.print(HELP)
    messages: list[Message] = []
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip()
        except EOFError:
            return 0
        if line == "/quit":
            return 0
        if line == "/reset":
            messages = []
        elif line:
            messages.append(Message("user", line))
            reply = answer(loaded, messages, config.max_new_tokens, config.temperature)
            messages.append(Message("assistant", reply))


def answer(loaded: LoadedRun, messages: Sequence[Message], max_new_tokens: int, temperature: float) -> str:
    """Stream the answer to a conversation to standard output; returns its text."""
    template: ChatTemplate = loaded.template
    streamer = TextStreamer(template.tokenizer, skip_prompt=True, skip_special_tokens=True)
    (ids,) = generate(
        loaded.model,
        [template.encode_prompt(messages)],
        stop_ids=template.stop_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        streamer=streamer,
    )
    return template.tokenizer.decode(ids, skip_special_tokens=True).strip()
