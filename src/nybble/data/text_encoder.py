"""TextEncoder: text to token ids, in pieces whose borders are token borders.

Training needs to know exactly where an answer's tokens begin, and the tokens before them must be the
ones chat would send. Tokenising a rendered conversation in one go does not promise that: "assistant\\n"
followed by an answer that starts with a newline may come out as one "\\n\\n" token that belongs to both.
So a text is encoded piece by piece, each piece in the light of what stands before it. Wherever a whole
tokenisation has a border at the same place, the result is the whole tokenisation.
"""

import re
from collections.abc import Iterable, Mapping

from transformers import PreTrainedTokenizerBase

from nybble.errors import DataError

KNOWN_CHARACTERS = 1 << 20  # of texts whose tokens are remembered, some ten bytes of memory each


class RowError(DataError):
    """One row that cannot be trained on as it is.

    Args:
        finding: id of the audit's finding it becomes (nybble.data.audit.FINDINGS).
        detail: what is wrong with this row.
    """

    def __init__(self, finding: str, origin: str, detail: str):
        self.finding, self.origin, self.detail = finding, origin, detail
        super().__init__(f"{origin}: {detail}")

    def __reduce__(self) -> tuple[type["RowError"], tuple[str, str, str]]:
        return RowError, (self.finding, self.origin, self.detail)


class TextEncoder:
    """A tokenizer that can continue a text.

    Args:
        tokenizer: a transformers tokenizer; it is read, never changed.

    Attributes:
        special_tokens: their spellings, longest first.
        eos_id: the end-of-sequence token, None where there is none.
        leading_bos: the beginning-of-sequence token where the tokenizer puts it before a text by itself, else None.
    """

    # Stand-ins for the text before a piece, tried where the real one merges with the piece's beginning. No vocabulary
    # has a longer token with the control character in it; the others are for tokenizers that drop control characters.
    STAND_INS = ("\x01", "\n", "x")

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        self.special_tokens = tuple(
            sorted({t.content for t in added if t.special and t.content.strip()}, key=lambda s: (-len(s), s))
        )
        # Text is split at these before anything else, so what stands before one cannot change what follows.
        self._special = re.compile("|".join(map(re.escape, self.special_tokens)) or r"(?!)")
        barriers = {t.content for t in added if t.special and not t.normalized and not t.single_word}
        self._barriers = re.compile("|".join(re.escape(t) for t in self.special_tokens if t in barriers) or r"(?!)")
        self._known: dict[str, list[int]] = {}  # turns recur, headers and ends do always
        self._known_characters = 0
        self.eos_id: int | None = tokenizer.eos_token_id
        bos: int | None = tokenizer.bos_token_id
        self.leading_bos = bos if bos is not None and tokenizer("x")["input_ids"][:1] == [bos] else None

    def spells_special(self, text: str) -> bool:
        """Whether a special token is spelled in a text."""
        return self._special.search(text) is not None

    def encode(self, text: str) -> list[int]:
        """The tokens of a text on its own, special tokens only where the text spells them."""
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []

    def _tokens_of(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Each text's tokens, those that are not known from one call: one each takes nearly twice the time."""
        known = self._known
        found = {text: known.get(text, []) for text in texts}
        if new := [text for text in found if text and text not in known]:
            found.update(
                zip(new, self._tokenizer(new, add_special_tokens=False, verbose=False)["input_ids"], strict=True)
            )
            if self._known_characters > KNOWN_CHARACTERS:
                self._known, self._known_characters = {}, 0
            self._known.update((text, found[text]) for text in new)
            self._known_characters += sum(map(len, new))
        return found

    def _encode_after(self, before: str, piece: str, tokens: Mapping[str, list[int]]) -> list[int]:
        """The tokens of `piece` where it follows `before`.

        Args:
            tokens: of `before` alone, and of both together.

        Raises:
            RowError: the tokenizer merges the piece's beginning with whatever stands before it.
        """
        for context in (before, *self.STAND_INS):
            found = tokens if context == before else self._tokens_of((context, context + piece))
            head, both = found[context], found[context + piece]
            if both[: len(head)] == head:  # a border in common
                return both[len(head) :]
        detail = f"no token border before {piece[:20]!r}, where an answer begins or ends"
        raise RowError("no-token-border", "a row", detail)

    def encode_pieces(self, text: str, cuts: list[int]) -> list[list[int]]:
        """Tokens of text[0:cuts[0]], text[cuts[0]:cuts[1]], ..., text[cuts[-1]:].

        The tokens before a cut depend on nothing behind it: that is what makes a training row begin with
        exactly the ids that chat sends.
        """
        assert cuts == sorted(cuts), cuts
        pieces: list[tuple[str, str]] = []  # what stands before each, and itself
        start = barrier = scanned = 0
        for end in (*cuts, len(text)):
            for match in self._barriers.finditer(text, scanned, start):  # never a look behind the cut
                barrier, scanned = match.span()
            pieces.append((text[barrier:start], text[start:end]))
            start = end
        tokens = self._tokens_of(whole for before, piece in pieces for whole in (before, before + piece) if piece)
        return [self._encode_after(before, piece, tokens) if piece else [] for before, piece in pieces]
