"""Thinking within an answer: where it stands, and which of it is kept.

`<think>` is DeepSeek's, Qwen's and GLM's; `[THINK]` Mistral's; the channel Gemma 4's. What stands between the marks is
the thought; the rest is the answer.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from nybble.data.examples import Message

Thinking = Literal["keep", "last", "drop"]
MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|channel>thought", "<channel|>"))
_SPELLED = re.compile("|".join(rf"\s*{re.escape(a)}(.*?){re.escape(b)}\s*" for a, b in MARKS), re.DOTALL)
_EMPTY = re.compile("|".join(rf"{re.escape(a)}\s*{re.escape(b)}\s*\Z" for a, b in MARKS))


def spelled_thought(content: str) -> tuple[str, str] | None:
    """(thought, answer) of content that begins with a marked thought; None where it does not."""
    match = _SPELLED.match(content)
    if match is None:
        return None
    thought = next(group for group in match.groups() if group is not None)
    return thought.strip(), content[match.end() :]


def has_thought(message: Message) -> bool:
    """Whether an assistant's turn holds thinking, in a key of its own or in its content, be it empty there."""
    return message.role == "assistant" and bool(message.reasoning or spelled_thought(message.content))


def ends_in_empty_thought(text: str) -> bool:
    """Whether a text ends in a thought that says nothing."""
    return _EMPTY.search(text) is not None


def keep_thoughts(messages: Sequence[Message], which: Thinking) -> tuple[tuple[Message, ...], int]:
    """The turns with the thoughts that are kept, and how many turns lost theirs.

    Args:
        which: all of them ("keep"), those behind the last user's turn ("last"), or none ("drop").
    """
    asked = max((index for index, message in enumerate(messages) if message.role == "user"), default=-1)
    kept = [
        message
        if which == "keep" or (which == "last" and index > asked) or not has_thought(message)
        else _without_thought(message)
        for index, message in enumerate(messages)
    ]
    return tuple(kept), sum(new is not old for new, old in zip(kept, messages, strict=True))


def thought_in_key(message: Message) -> Message:
    """The turn with a thought that its content spells in the key for it."""
    spelled = spelled_thought(message.content) if message.role == "assistant" and not message.reasoning else None
    if spelled is None or not spelled[0]:
        return message
    return replace(message, reasoning=spelled[0], content=spelled[1])


def _without_thought(message: Message) -> Message:
    spelled = spelled_thought(message.content)
    return replace(message, reasoning="", content=message.content if spelled is None else spelled[1])
