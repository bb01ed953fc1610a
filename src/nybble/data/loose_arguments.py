"""Arguments of calls in brackets that are no JSON: bare names, and text in quotes of a template's own. Gemma 4 writes
`{city:<|"|>Rome<|"|>}`, LFM2 Python's `(city='Rome', days=3)`.
"""

import json
import re
from typing import Any, NamedTuple

CLOSING = {"(": ")", "[": "]", "{": "}"}
WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
NAME, WORD, SPACE = re.compile(r"[^\s,(){}\[\]]+"), re.compile(r"[^\s,)\]}]*"), re.compile(r"\s*")
QUOTED = re.compile(r"'((?:[^'\\]|\\.)*)'", re.DOTALL)
ESCAPED = {"n": "\n", "r": "\r", "t": "\t"}  # any other character behind a backslash is itself


class LooseForm(NamedTuple):
    """How such arguments are written, with commas between them.

    Args:
        opening: the bracket before them.
        between: a name and its value.
        quotes: around text.
    """

    opening: str
    between: str
    quotes: tuple[str, str]


def read_arguments(form: LooseForm, text: str, at: int) -> tuple[dict[str, Any], int] | None:
    """The arguments whose opening bracket ends at `at`, and where their closing one does; None where they cannot be
    read.
    """
    try:
        return _Values(form, text).pairs(at, form.between, CLOSING[form.opening])
    except (ValueError, RecursionError):  # no JSON, or nested without end
        return None


class _Values:
    """Reads values in a text; every method is given a place and returns what it read and the place behind it, and
    raises ValueError where that is not there."""

    def __init__(self, form: LooseForm, text: str):
        self.form, self.text = form, text

    def pairs(self, at: int, between: str, closing: str) -> tuple[dict[str, Any], int]:
        """Names and values, up to a closing bracket."""
        found: dict[str, Any] = {}
        at = self._space(at)
        while not self.text.startswith(closing, at):
            name, at = self._name(self._behind(",", at) if found else at, between)
            found[name], at = self._value(at)
            at = self._space(at)
        return found, at + len(closing)

    def _name(self, at: int, between: str) -> tuple[str, int]:
        if self.text.startswith(('"', "'", self.form.quotes[0]), at):
            name, at = self._value(at)
            return name, self._behind(between, at)
        end = self.text.index(between, at)
        name = self.text[at:end]
        if NAME.fullmatch(name) is None:
            raise ValueError(f"no name at {at}")
        return name, end + len(between)

    def _value(self, at: int) -> tuple[Any, int]:
        at = self._space(at)
        opening, ending = self.form.quotes
        begin = self.text[at : at + 1]
        if self.text.startswith(opening, at) and len(opening) > 1:  # marks of its own: nothing in between is escaped
            end = self.text.index(ending, at + len(opening))
            return self.text[at + len(opening) : end], end + len(ending)
        if begin == '"':
            return json.JSONDecoder().raw_decode(self.text, at)
        if begin == "'":
            return self._quoted(at)
        if begin == "[":
            return self._list(at + 1)
        if begin == "{":
            return self.pairs(at + 1, ":", "}")
        word = WORD.match(self.text, at)
        assert word is not None
        return WORDS[word[0]] if word[0] in WORDS else json.loads(word[0]), word.end()

    def _quoted(self, at: int) -> tuple[str, int]:
        match = QUOTED.match(self.text, at)
        if match is None:
            raise ValueError(f"no end of the text at {at}")
        return re.sub(r"(?s)\\(.)", lambda each: ESCAPED.get(each[1], each[1]), match[1]), match.end()

    def _list(self, at: int) -> tuple[list[Any], int]:
        found: list[Any] = []
        at = self._space(at)
        while not self.text.startswith("]", at):
            value, at = self._value(self._behind(",", at) if found else at)
            found.append(value)
            at = self._space(at)
        return found, at + 1

    def _space(self, at: int) -> int:
        match = SPACE.match(self.text, at)
        assert match is not None
        return match.end()

    def _behind(self, literal: str, at: int) -> int:
        at = self._space(at)
        if not self.text.startswith(literal, at):
            raise ValueError(f"no {literal} at {at}")
        return self._space(at + len(literal))
