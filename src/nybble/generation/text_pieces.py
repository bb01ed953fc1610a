"""Tokens as text, while they come."""

from typing import Any

UNFINISHED = "\ufffd"  # what decoders put for bytes that are no whole character (yet)


class TextPieces:
    """Turns tokens into text as they come, never a part of a character.

    What a token adds depends on the tokens before it (spaces, bytes of one character), so the text of the few
    tokens since the last whole piece is compared with and without the new ones.

    Args:
        marks: special tokens are text too.
    """

    def __init__(self, tokenizer: Any, marks: bool = False):
        self.ids: list[int] = []
        self._marks = marks
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
        """The text of all tokens so far, stripped."""
        return self._decode(self.ids).strip()

    def _new_text(self) -> str:
        before = self._decode(self.ids[self._context : self._shown])
        return self._decode(self.ids[self._context :])[len(before) :]

    def _give(self, text: str) -> str:
        if text:
            self._context, self._shown = self._shown, len(self.ids)
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=not self._marks, clean_up_tokenization_spaces=False)
