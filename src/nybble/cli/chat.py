"""`nybble chat`."""

from typing import Any

from nybble.options.option import build_options
from nybble.options.verbs import ChatConfig


def chat(given: dict[str, Any]) -> int:
    """Talk to the model that a training run made."""
    config = build_options(ChatConfig, given)
    from nybble.cli.conversation import Conversation
    from nybble.cli.render import Terminal
    from nybble.evaluation.chat import load_chat

    with Terminal() as terminal:
        conversation = Conversation(load_chat(config, terminal), config.answers, terminal)
    if (prompt := config.answers.prompt) is not None:
        conversation.ask(prompt)
    else:
        conversation.hold()
    return 0
