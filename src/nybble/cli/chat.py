"""`nybble chat`."""

from typing import Any

from rich.console import Console

from nybble.options.option import build_options
from nybble.options.verbs import ChatConfig


def chat(given: dict[str, Any]) -> int:
    """Talk to the model that a training run made."""
    config = build_options(ChatConfig, given)
    from nybble.evaluation.chat import chat as run_chat

    return run_chat(config, Console())
