"""Where the assistant's turns stand in a rendered conversation.

A model is trained on what it will be asked to write: the assistant's words and the token that ends the
turn. Everything else (system, user, headers, the newline some templates put after the end of a turn) is
context. The prompt of turn i is render(messages[:i], add_generation_prompt=True), which is what chat
sends; the turn is what render(messages[:i + 1]) adds to it, up to its end-of-turn token. No template is
parsed and no header searched for, so any template works that only appends; the others are told apart here.

Each beginning of a conversation is rendered once: the time grows with the square of the number of turns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nybble.data.examples import Message

MARK = "Zqxj"  # an answer that no template's own words contain
# Conversations that a template may take; some want a system turn.
PROBES = (
    (Message("user", "a"), Message("assistant", MARK)),
    (Message("system", "s"), Message("user", "a"), Message("assistant", MARK)),
)


class Rendered(NamedTuple):
    """A conversation as text, and the character spans of the template's own {% generation %} blocks, where it has
    any."""

    text: str
    generated: tuple[tuple[int, int], ...] | None = None


Render = Callable[[Sequence[Message], bool], Rendered]  # (messages, add_generation_prompt)


@dataclass(frozen=True)
class Turn:
    """An assistant's turn that answers a user, as chat would produce it: rendered.text[start:end].

    Args:
        index: of its message.
        rendered: a text that ends with this turn, or goes on behind it.
        start: where its prompt ends.
        end: behind its end-of-turn token, or behind its words where it has none.
        closed: whether the template ends it in a special token.
        prompted: whether the text before it is the prompt that chat would send.
    """

    index: int
    rendered: Rendered
    start: int
    end: int
    closed: bool
    prompted: bool

    def stands_in(self, text: str) -> bool:
        """Whether a longer rendering of the conversation still has the turn as it was. (Qwen3 strips the thinking
        of earlier turns: those can only be trained in a text that ends with them.)"""
        return self.prompted and text.startswith(self.rendered.text[: self.end])

    def supervised_start(self, generated: Sequence[tuple[int, int]] | None) -> int | None:
        """Where supervision begins, in characters; None where the template leaves the turn out.

        Args:
            generated: spans of the {% generation %} blocks of the text that the turn stands in. A block may begin
                behind the prompt's end (leaving out a forced beginning); it is extended to the end-of-turn token,
                which several published templates forget.
        """
        if generated is None:
            return self.start
        inside = (max(self.start, start) for start, end in generated if start < self.end and end > self.start)
        return next(inside, None)


def find_turns(
    messages: Sequence[Message], whole: Rendered, render: Render, closing: str | None, special_tokens: Sequence[str]
) -> list[Turn]:
    """The assistant's turns of `messages`, each in the text that ends with it.

    A turn that no user's turn precedes answers nothing and is left out.

    Args:
        whole: all of `messages`, rendered.
        closing: what the template usually adds behind an answer (see `closing_of`); None where that is not known.
    """
    turns: list[Turn] = []
    asked = False
    for index, message in enumerate(messages):
        asked = asked or message.role == "user"
        if message.role != "assistant" or not asked:
            continue
        prompt = render(messages[:index], True).text
        upto = render(messages[: index + 1], False)
        added = closing
        if added is None or not upto.text.endswith(added):  # it depends on what was said before
            added = closing_of(render, [*messages[:index], Message("assistant", MARK)])
        end, closed = _turn_end(upto.text, added, special_tokens)
        end = max(end, len(prompt))
        rendered = whole if whole.text.startswith(upto.text[:end]) else upto  # no second copy is kept in memory
        turns.append(Turn(index, rendered, len(prompt), end, closed, upto.text.startswith(prompt)))
    return turns


def closing_of(render: Render, messages: Sequence[Message]) -> str | None:
    """What the template adds behind the last turn's words, which are MARK; None where it does not show them."""
    _, found, closing = render(messages, False).text.rpartition(MARK)
    return closing if found else None


def _turn_end(text: str, closing: str | None, special_tokens: Sequence[str]) -> tuple[int, bool]:
    """End of the turn that `text` ends with, and whether a special token ends it.

    Some templates close with more than the end of the turn (Phi-3: "<|end|>\\n<|endoftext|>"): the first special
    token of the closing is the one a model must produce to stop. Special tokens among the turn's own words are none
    of the closing.
    """
    if closing is not None and text.endswith(closing):
        ends = [(at, at + len(token)) for token in special_tokens if (at := closing.find(token)) >= 0]
        if ends:
            first = min(ends, key=lambda place: (place[0], -place[1]))
            return len(text) - len(closing) + first[1], True
    return len(text.rstrip()), False
