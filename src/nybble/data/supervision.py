"""Where the assistant's turns stand in a rendered conversation.

A model is trained on what it will be asked to write: the assistant's words and the token that ends the
turn. Everything else (system, user, headers, the newline some templates put after the end of a turn) is
context. The prompt of turn i is render(messages[:i], add_generation_prompt=True), which is what chat
sends; the turn is what render(messages[:i + 1]) adds to it, up to its end-of-turn token. No template is
parsed and no header searched for, so any template works that only appends; the others are told apart here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nybble.data.examples import Message

Render = Callable[[Sequence[Message], bool], str]  # (messages, add_generation_prompt) -> text


@dataclass(frozen=True)
class Turn:
    """An assistant's turn in a rendered text, in characters.

    Args:
        index: of its message.
        start: where its prompt ends.
        end: behind its end-of-turn token, or behind its words where it has none.
        closed: whether it ends in a special token.
    """

    index: int
    start: int
    end: int
    closed: bool


@dataclass(frozen=True)
class Turns:
    """The assistant's turns that answer a user, sorted by how the template treats them.

    Args:
        found: turns that stand in the text as chat would have produced them.
        rewritten: messages that the template words differently once the conversation goes on (Qwen3 strips the
            thinking of earlier turns): they can only be trained in a text that ends with them.
        unprompted: messages whose text does not begin with the prompt that chat would send.
    """

    found: list[Turn]
    rewritten: list[int]
    unprompted: list[int]


def locate_turns(messages: Sequence[Message], text: str, render: Render, special_tokens: Sequence[str]) -> Turns:
    """Find the assistant's turns of `messages` in `text`, which is `messages` rendered.

    A turn that no user's turn precedes answers nothing and is left out.
    """
    turns = Turns([], [], [])
    asked = False
    for index, message in enumerate(messages):
        asked = asked or message.role == "user"
        if message.role != "assistant" or not asked:
            continue
        prompt = render(messages[:index], True)
        upto = render(messages[: index + 1], False)
        end, closed = _turn_end(upto, len(prompt), special_tokens)
        if not upto.startswith(prompt):
            turns.unprompted.append(index)
        elif text.startswith(upto[:end]):
            turns.found.append(Turn(index, len(prompt), end, closed))
        else:
            turns.rewritten.append(index)
    return turns


def _turn_end(text: str, start: int, special_tokens: Sequence[str]) -> tuple[int, bool]:
    """End of the turn text[start:], and whether a special token ends it.

    Some templates close with more than the end of the turn (Phi-3: "<|end|>\\n<|endoftext|>"): the first special
    token of the trailing run of special tokens and white space is the one a model must produce to stop.
    """
    end = start + len(text[start:].rstrip())
    closed_at, position = end, end
    closed = False
    while token := next((t for t in special_tokens if text.endswith(t, start, position)), None):
        closed_at, closed = position, True
        position = start + len(text[start : position - len(token)].rstrip())
    return closed_at, closed


def supervised_start(turn: Turn, generated: Sequence[tuple[int, int]] | None) -> int | None:
    """Where supervision of a turn begins, in characters; None where the template leaves the turn out.

    Args:
        generated: the character spans of the template's own {% generation %} blocks, or None where it has none.
            A block may begin behind the prompt's end (leaving out a forced beginning); it is extended to the
            end-of-turn token, which several published templates forget.
    """
    if generated is None:
        return turn.start
    return next((max(turn.start, start) for start, end in generated if start < turn.end and end > turn.start), None)
