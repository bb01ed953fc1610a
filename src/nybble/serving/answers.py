"""An answer as it comes, told apart into thought, words and tool calls, as OpenAI's objects have them.

What a template writes around thoughts and calls is in data/answer_forms.py. Text that could be the beginning of a mark
is held back until it is clear; calls are held until the answer ends, since only whole ones can be read.
"""

import json
import re
import uuid
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any, Protocol

from nybble.data.answer_forms import AnswerForm, CallGrammar, Schemas, read_calls

Delta = dict[str, Any]  # what is added to a message


class Reader(Protocol):
    """Makes deltas of the pieces of an answer."""

    @property
    def found_calls(self) -> bool:
        """Whether the answer calls tools."""

    @property
    def warnings(self) -> Sequence[str]:
        """What is to be said of the answer, once it has ended."""

    def add(self, piece: str) -> list[Delta]:
        """What can be told now."""

    def finish(self) -> list[Delta]:
        """What was held back, at the end."""


class PlainAnswer:
    """All of it is words."""

    found_calls, warnings = False, ()

    def add(self, piece: str) -> list[Delta]:
        """As `Reader` says."""
        return [{"content": piece}] if piece else []

    def finish(self) -> list[Delta]:
        """As `Reader` says."""
        return []


class _Part(Enum):
    BEGINNING = auto()  # of what, is not clear yet
    THOUGHT = auto()
    WORDS = auto()
    CALLS = auto()


class MixedAnswer:
    """Thought, words and calls, in this order.

    Args:
        schemas: of the tools that the client named; None where it named none, and calls stay text.
        continues: the answer goes on with one that the client began, and so with words.
        dropped: special tokens, which are no text; those of the form are read.
    """

    def __init__(self, form: AnswerForm, schemas: Schemas | None, continues: bool = False, dropped: Sequence[str] = ()):
        self._form, self._schemas = form, schemas
        self._grammar: CallGrammar | None = form.calls if schemas is not None else None
        outside = [token for token in dropped if token not in form.literals]
        self._dropped = re.compile("|".join(map(re.escape, outside)) or r"(?!)")
        begun = form.thought is not None and form.thought.begun
        self._part = _Part.WORDS if continues else _Part.THOUGHT if begun else _Part.BEGINNING
        self._held, self._begins = "", not continues  # of this part nothing has been told
        self.found_calls, self.warnings = False, list[str]()

    def add(self, piece: str) -> list[Delta]:
        """As `Reader` says."""
        self._held += self._dropped.sub("", piece)
        return self._told(ended=False)

    def finish(self) -> list[Delta]:
        """As `Reader` says."""
        return self._told(ended=True)

    def _told(self, ended: bool) -> list[Delta]:
        deltas: list[Delta] = []
        if self._part is _Part.BEGINNING:
            self._begin(ended)
        if self._part is _Part.THOUGHT:
            deltas += self._thought(ended)
        if self._part is _Part.WORDS:
            deltas += self._words(ended)
        if self._part is _Part.CALLS and ended:
            deltas += self._calls()
        return deltas

    def _begin(self, ended: bool) -> None:
        """Whether the answer begins with a thought."""
        text, thought = self._held.lstrip(), self._form.thought
        if thought is None:
            self._part = _Part.WORDS
        elif text.startswith(thought.opening):
            self._part, self._held = _Part.THOUGHT, text.removeprefix(thought.opening)
        elif ended or not thought.opening.startswith(text):
            self._part = _Part.WORDS

    def _thought(self, ended: bool) -> list[Delta]:
        assert self._form.thought is not None
        opening, closing, begun = self._form.thought
        if begun and self._begins:  # the model may write once more what the prompt ends in
            text = self._held.lstrip()
            if not ended and opening.startswith(text):
                return []
            self._held = text.removeprefix(opening)
        before, found, behind = self._held.partition(closing)
        if found:
            told = self._tell("reasoning_content", before.rstrip())
            self._part, self._held, self._begins = _Part.WORDS, behind, True
            return told
        return self._tell("reasoning_content", self._shown(closing, ended))

    def _words(self, ended: bool) -> list[Delta]:
        if self._begins:
            text, words = self._held.lstrip(), self._form.words
            if words and not ended and words.startswith(text):
                return []
            self._held = text.removeprefix(words) if words else self._held
        if self._grammar is None:
            told, self._held = self._held, ""
            return self._tell("content", told)
        mark = self._grammar.mark
        if not mark:  # calls are the whole answer, or there are none
            if self._begins and self._held.lstrip().startswith("{"):
                self._part = _Part.CALLS
                return []
            told, self._held = (self._held, "") if self._held.strip() or ended else ("", self._held)
            return self._tell("content", told)
        at = self._held.find(mark)
        if at < 0:
            return self._tell("content", self._shown(mark, ended))
        words = self._held[:at].rstrip()
        self._held, self._part = self._held[len(words) :], _Part.CALLS
        return self._tell("content", words)

    def _calls(self) -> list[Delta]:
        assert self._grammar is not None and self._schemas is not None
        text, self._held = self._held, ""
        found = read_calls(self._grammar, text.lstrip(), self._schemas)
        if found is None:
            if self._grammar.mark:
                self.warnings.append("The answer begins a tool call that cannot be read; it stays text.")
            return self._tell("content", text)
        calls, behind = found
        self.found_calls = True
        listed = [
            {
                "index": index,
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
            }
            for index, call in enumerate(calls)
        ]
        return [*self._tell("content", behind), {"tool_calls": listed}]

    def _shown(self, mark: str, ended: bool) -> str:
        """What is held and is neither the beginning of a mark nor white space before one; the rest stays held."""
        cut = len(self._held)
        if not ended:
            possible = max((n for n in range(1, len(mark)) if self._held.endswith(mark[:n])), default=0)
            cut = len(self._held[: cut - possible].rstrip())
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def _tell(self, key: str, text: str) -> list[Delta]:
        if self._begins:
            text = text.lstrip() if self._part is not _Part.WORDS or self._form.thought is not None else text
        if not text:
            return []
        self._begins = False
        return [{key: text}]


def joined(deltas: Sequence[Delta]) -> Delta:
    """The message that deltas add up to; its content is null beside calls alone."""
    message: Delta = {"role": "assistant", "content": ""}
    for delta in deltas:
        for key, value in delta.items():
            message[key] = message.get(key, "") + value if isinstance(value, str) else value
    if "tool_calls" in message:
        message["content"] = message["content"] or None
        message["tool_calls"] = [
            {key: value for key, value in call.items() if key != "index"} for call in message["tool_calls"]
        ]
    return message
