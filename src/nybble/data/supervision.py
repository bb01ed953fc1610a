"""Where the assistant's turns stand in a rendered conversation.

A model is trained on what it will be asked to write: the assistant's words and the token that ends the
turn. Everything else (system, user, headers, the newline some templates put after the end of a turn) is
context. The prompt of turn i is render(messages[:i], add_generation_prompt=True), which is what chat
sends; the turn is what render(messages[:i + 1]) adds to it, up to its end-of-turn token. No template is
parsed and no header searched for, so any template works that only appends; the others are told apart here.

Each beginning of a conversation is rendered once, the whole of it by the caller: the time grows with the square of the
number of turns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from nybble.data.examples import Message
from nybble.data.thinking import Thinking, ends_in_empty_thought, has_thought

MARK = "Zqxj"  # an answer that no template's own words contain
# Conversations that a template may take; some want a system turn.
PROBES = (
    (Message("user", "a"), Message("assistant", MARK)),
    (Message("system", "s"), Message("user", "a"), Message("assistant", MARK)),
)


class Learnt(NamedTuple):
    """Which part of a conversation is learnt.

    Args:
        train_on: the assistant's turns, the last of them, those behind the last user's turn, or every token.
        thinking: which thoughts rows keep: all, those behind the last user's turn, or none.
    """

    train_on: Literal["assistant", "last", "completion", "all"] = "assistant"
    thinking: Thinking = "keep"

    def choose(self, messages: Sequence[Message]) -> set[int]:
        """Numbers of the assistant's turns that are learnt."""
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        if self.train_on == "last":
            answers = answers[-1:]
        elif self.train_on == "completion":
            asked = max((index for index, message in enumerate(messages) if message.role == "user"), default=-1)
            answers = [index for index in answers if index > asked]
        return {index for index in answers if messages[index].supervised}


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
        words: where what the model is to write begins: behind an empty thought that the template puts before it, and
            behind the words that the prompt gives.
        end: behind its end-of-turn token, or behind its words where it has none.
        closed: whether the template ends it in a special token.
        prompted: whether the text before it is the prompt that chat would send.
    """

    index: int
    rendered: Rendered
    start: int
    words: int
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
            return self.words
        inside = (max(self.words, start) for start, end in generated if start < self.end and end > self.words)
        return next(inside, None)


def find_turns(
    messages: Sequence[Message],
    whole: Rendered,
    render: Render,
    closing: str | None,
    special_tokens: Sequence[str],
    empty_thought: str = "",
) -> list[Turn]:
    """The assistant's turns of `messages`, each in the text that ends with it.

    A turn that no user's turn precedes answers nothing and is left out.

    Args:
        whole: all of `messages`, rendered.
        closing: what the template usually adds behind an answer (see `closing_of`); None where that is not known.
        empty_thought: what it puts before an answer without a thought (see `empty_thought_of`).
    """
    turns: list[Turn] = []
    asked = False
    for index, message in enumerate(messages):
        asked = asked or message.role == "user"
        if message.role != "assistant" or not asked:
            continue
        prompt = render(messages[:index], True).text
        upto = whole if index + 1 == len(messages) else render(messages[: index + 1], False)
        if not upto.text.startswith(prompt):
            upto = _behind_prompt(render, messages[: index + 1], prompt, upto)
        added = closing
        of_calls = False
        if added is None or not upto.text.endswith(added):  # it depends on what was said before, or on what is called
            added, of_calls = closing_of(render, [*messages[:index], _marked(message)]), bool(message.calls)
        end, closed = _turn_end(upto.text, added, special_tokens, of_calls)
        prompted = upto.text.startswith(prompt)
        end = max(end, len(prompt)) if prompted else end
        rendered = whole if whole.text.startswith(upto.text[:end]) else upto  # no second copy is kept in memory
        words = _words_start(message, upto.text, len(prompt), end, empty_thought)
        turns.append(Turn(index, rendered, len(prompt), words, end, closed, prompted))
    return turns


def _behind_prompt(render: Render, messages: Sequence[Message], prompt: str, upto: Rendered) -> Rendered:
    """The last turn as chat would produce it where the template, once it is there, words differently what it follows
    (gpt-oss drops thoughts before calls): the prompt, and behind it what the turn is behind its heading. As it was
    where that heading is not found."""
    history = render(messages[:-1], False).text
    heading = prompt.removeprefix(history) if prompt.startswith(history) else ""
    other = render([*messages[:-1], Message("assistant", MARK)], False).text
    differs = next((n for n, (a, b) in enumerate(zip(upto.text, other, strict=False)) if a != b), len(other))
    at = upto.text.rfind(heading, 0, differs) if heading else -1
    if at < 0:
        return upto
    start, shift = at + len(heading), len(prompt) - at - len(heading)
    spans = upto.generated
    if spans is not None:
        spans = tuple((max(a, start) + shift, b + shift) for a, b in spans if b > start)
    return Rendered(prompt + upto.text[start:], spans)


def _marked(message: Message) -> Message:
    """An assistant's turn whose last words, or last call's argument, are MARK."""
    if not message.calls:
        return Message("assistant", MARK)
    return replace(message, calls=(*message.calls[:-1], replace(message.calls[-1], arguments={"a": MARK})))


def _words_start(message: Message, text: str, start: int, end: int, empty_thought: str) -> int:
    """Where what the model is to write begins in its turn, text[start:end]."""
    if message.given:
        given, rest = message.content[: message.given], message.content[message.given :]
        at = text.find(message.content, start, end)
        if at < 0 and (at := text.find(message.content.strip(), start, end)) >= 0:  # many templates strip
            given = message.content.strip().removesuffix(rest.rstrip())
        return at + len(given) if at >= 0 else end
    hollow = not has_thought(message) and text.startswith(empty_thought, start, end)
    return start + len(empty_thought) if hollow else start


def empty_thought_of(render: Render, messages: Sequence[Message]) -> str:
    """The empty thought that the template puts between the prompt and the last turn's words, which are MARK, or what is
    left of it where the prompt begins it (Qwen3.5); "" where it puts none."""
    prompt = render(messages[:-1], True).text
    before, found, _ = render(messages, False).text.rpartition(MARK)
    added = before[len(prompt) :] if found and before.startswith(prompt) else ""
    return added if added.strip() and ends_in_empty_thought(before) else ""


def closing_of(render: Render, messages: Sequence[Message]) -> str | None:
    """What the template adds behind the last turn's words, which are MARK; None where it does not show them."""
    _, found, closing = render(messages, False).text.rpartition(MARK)
    return closing if found else None


def _turn_end(text: str, closing: str | None, special_tokens: Sequence[str], of_calls: bool) -> tuple[int, bool]:
    """End of the turn that `text` ends with, and whether a special token ends it.

    Some templates close with more than the end of the turn (Phi-3: "<|end|>\\n<|endoftext|>"): the first special
    token of the closing is the one a model must produce to stop; behind a call the last one, since special tokens may
    close the call itself. Special tokens among the turn's own words are none of the closing.
    """
    if closing is not None and text.endswith(closing):
        ends = [(at, at + len(token)) for token in special_tokens if (at := closing.find(token)) >= 0]
        if ends:
            end = max(ends) if of_calls else min(ends, key=lambda place: (place[0], -place[1]))
            return len(text) - len(closing) + end[1], True
    return len(text.rstrip()), False
