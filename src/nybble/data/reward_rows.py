"""Pairs of answers whose rewards are to lie apart: rows of preferences, and how far apart, where a column says so."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from nybble.data.cells import finite_number, says_nothing
from nybble.data.examples import EncodedExample, Example
from nybble.data.field_names import FieldNames
from nybble.data.file_kinds import Row
from nybble.data.preference_rows import EncodedPair
from nybble.data.preferences import PairExample, encode_pair, find_pair_layout, no_pairs
from nybble.data.prepare import RowKind
from nybble.data.readers import Layout, RowForms
from nybble.data.template import ChatTemplate
from nybble.data.text_rows import TextRow, TextsRow
from nybble.errors import DataError

MARGIN = "margin"  # as TRL has it


@dataclass(frozen=True, eq=False)
class ScoredPair(TextsRow):
    """Two conversations that begin alike: the one with the chosen answer, then the one with the rejected.

    Args:
        margin: how far apart their rewards are to be.
    """

    margin: float = 0.0

    @property
    def texts(self) -> tuple[TextRow, ...]:
        """Both; that of the chosen answer is told the margin."""
        chosen, rejected = super().texts
        return replace(chosen, target=self.margin), rejected

    @property
    def supervised_tokens(self) -> int:
        return len(self.lengths) if self.supervised.any() else 0

    @property
    def shared_tokens(self) -> int:
        chosen, rejected = self.input_ids.split(self.lengths)
        least = min(self.lengths)
        return int((chosen[:least] == rejected[:least]).int().cumprod(0).sum())

    @property
    def content(self) -> bytes:
        return super().content + repr(self.margin).encode()

    def truncate(self, max_seq_len: int) -> Self:
        """From a pair that does not fit nothing is learnt: an answer is judged at its end, as TRL has it too."""
        if max(self.lengths) <= max_seq_len:
            return self
        return replace(self, supervised=torch.zeros_like(self.supervised))


def find_scored_pair_layout(row: Row, fields: FieldNames) -> Layout | None:
    """As `find_pair_layout`, and with the margin where a row has it.

    Raises:
        ConfigError: as there.
    """
    layout = find_pair_layout(row, fields)
    if layout is None:
        return None

    def build(row: Row, origin: str) -> Example:
        pair = layout.build(row, origin)
        assert isinstance(pair, PairExample), pair
        return replace(pair, margin=_margin(row, origin))

    return layout._replace(optional=(*layout.optional, MARGIN), build=build, raw=(*layout.raw, MARGIN))


def _margin(row: Row, origin: str) -> float:
    """0 where the row says none."""
    value: Any = row.get(MARGIN)
    return 0.0 if says_nothing(value) else finite_number(value, MARGIN, "odd-margin", origin)


def encode_scored_pair(template: ChatTemplate, example: Example) -> list[EncodedExample]:
    """The row of a pair, untruncated: each conversation whole, as the chat template writes it, up to the answer's end.

    Raises:
        RowError: it cannot be compared; its `finding` says why.
    """
    assert isinstance(example, PairExample), example
    (pair,) = encode_pair(template, example)
    assert isinstance(pair, EncodedPair)
    texts = [TextRow(side.input_ids, side.supervised, side.origin) for side in pair.documents]
    return [ScoredPair.of(texts, margin=example.margin)]


def conversation_row(template: ChatTemplate, conversation: Example, max_seq_len: int) -> TextRow:
    """A conversation whose last answer is to be given its reward.

    Raises:
        DataError: it does not end in an answer, the template does not take it, or it is longer than `max_seq_len`.
    """
    if conversation.turns()[-1].role != "assistant":
        raise DataError("a conversation that does not end in an answer of the assistant", "", "give it with its answer")
    if conversation.messages is not None:
        earlier = (replace(turn, weight=0.0) if turn.role == "assistant" else turn for turn in conversation.messages)
        conversation = replace(conversation, messages=(*tuple(earlier)[:-1], conversation.messages[-1]))
    (whole,) = template.encode_example(conversation)
    if len(whole) > max_seq_len:
        raise DataError(
            f"a conversation of {len(whole)} tokens",
            f"allowed: up to {max_seq_len}, the run's max_seq_len; an answer is judged at its end",
        )
    return TextRow(whole.input_ids, whole.supervised, whole.origin)


def pairs_of(rows: Sequence[EncodedExample]) -> list[ScoredPair]:
    """The rows, which are pairs."""
    return [row for row in rows if isinstance(row, ScoredPair)]


SCORED_PAIR_ROWS = RowKind(RowForms(find_scored_pair_layout, no_pairs), encode_scored_pair, documents=2)
