"""Rows of texts whose embeddings are to lie near each other: pairs, those with negatives too, those with a score.

Columns are named as users of sentence-transformers name them:
    anchor, positive            (also: query/document, question/answer, sentence1/sentence2, ..)
    .., negative                (also: negatives, neg, a list of them; negative_1, negative_2, ..)
    query, pos, neg             lists, as FlagEmbedding takes them; each of `pos` makes a row
    sentence1, sentence2, score (also: similarity_score, similarity): how near, numbers of any scale
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

from nybble.data.cells import describe, finite_number, says_nothing
from nybble.data.encoded_rows import ChangedRows, EncodedRows, counted
from nybble.data.examples import EncodedExample, Example
from nybble.data.field_names import FieldNames
from nybble.data.file_kinds import Row
from nybble.data.findings import Finding, find
from nybble.data.prepare import RowKind
from nybble.data.readers import COLUMNS_NAMED, Layout, RowForms
from nybble.data.template import ChatTemplate
from nybble.data.text_encoder import RowError
from nybble.data.text_rows import TextsRow, encode_texts
from nybble.errors import DataError

PAIRS = (  # the first that a row has both of
    ("anchor", "positive"),
    ("query", "positive"),
    ("query", "pos"),
    ("query", "document"),
    ("query", "passage"),
    ("query", "answer"),
    ("query", "response"),
    ("question", "answer"),
    ("question", "positive"),
    ("sentence1", "sentence2"),
    ("sentence_A", "sentence_B"),
    ("text1", "text2"),
)
NEGATIVE = re.compile(r"(hard_)?(negatives?|neg)(_?\d+)?")
SCORES = ("score", "similarity_score", "similarity")
LABEL = "label"  # says of some data sets' pairs that they are near, of others' that they are not
FORMS = f"{'; '.join('/'.join(columns) for columns in PAIRS)}, each with negatives or with one of {', '.join(SCORES)}"


@dataclass(frozen=True)
class ComparedExample(Example):
    """An anchor, in `text`, and what lies near to it, or far from it.

    Args:
        positives: texts that are near, each by itself.
        negatives: texts that are not.
        score: how near the one positive is; None where that is not said.
    """

    positives: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    score: float | None = None

    def full_text(self) -> str:
        return "\n".join((super().full_text(), *self.positives, *self.negatives))

    @property
    def content_key(self) -> str:
        """Of anchor and positives: the same pair is not held out beside other negatives, or under another score."""
        return Example("", text="\n".join((self.text or "", *self.positives))).content_key


@dataclass(frozen=True, eq=False)
class ComparedTexts(TextsRow):
    """An anchor, its positive, its negatives.

    Args:
        score: how near the two are; None where that is not said.
        number: of the row among those that it is of; -1 before all are known.
    """

    score: float | None = None
    number: int = -1

    @property
    def content(self) -> bytes:
        return super().content + repr(self.score).encode()

    def truncate(self, max_seq_len: int) -> Self:
        """Each text without the end that is too much; the tokens that the tokenizer adds around it stay."""
        if max(self.lengths) <= max_seq_len:
            return self
        return self.of([text.truncate(max_seq_len) for text in self.texts], score=self.score, number=self.number)


def compared_of(rows: Sequence[EncodedExample]) -> list[ComparedTexts]:
    """The rows, which compare texts."""
    return [row for row in rows if isinstance(row, ComparedTexts)]


# ---- reading -------------------------------------------------------------------------------------


def find_compared_layout(row: Row, fields: FieldNames) -> Layout | None:
    """The layout of a row of texts that are near each other, or not; None where it is none.

    Raises:
        ConfigError: a column is named that such rows do not have.
    """
    fields.refuse(("prompt", "completion", "messages", "chosen", "rejected"), f"texts that are compared: {FORMS}")
    named = () if fields.text is None else tuple(name.strip() for name in fields.text.split(","))
    pair = named[:2] or next((columns for columns in PAIRS if all(column in row for column in columns)), ())
    if len(pair) < 2 or (LABEL in row and fields.label is None):
        return None
    score = fields.label or next((column for column in SCORES if column in row and column not in pair), None)
    negatives = (*named[2:], *(column for column in row if NEGATIVE.fullmatch(column) and column not in named))

    def build(row: Row, origin: str) -> ComparedExample:
        anchor, *more = _texts(row, pair[0], origin)
        if more:
            raise RowError("not-text", origin, f"{pair[0]!r} is a list of several")
        positives = _texts(row, pair[1], origin)
        others = tuple(text for column in negatives if column in row for text in _texts(row, column, origin))
        if score is None:
            _check_different(origin, anchor, positives, others)
            return ComparedExample(origin, text=anchor, positives=positives, negatives=others)
        if others or len(positives) > 1:
            raise RowError("odd-score", origin, f"{score!r} is for one pair, and the row has more texts")
        return ComparedExample(
            origin, text=anchor, positives=positives, score=finite_number(row.get(score), score, "odd-score", origin)
        )

    columns = (*pair, *((score,) if score else ()))
    name = "/".join((*columns, *negatives))
    return Layout("labelled", name, columns, negatives, build, raw=(score,) if score else ())


def _texts(row: Row, column: str, origin: str) -> tuple[str, ...]:
    """What a column says: a text, or a list of them; none of them empty."""
    value = row[column]
    if NEGATIVE.fullmatch(column) and says_nothing(value):
        return ()
    texts = value if isinstance(value, list) and value else [value]
    if odd := next((each for each in texts if not isinstance(each, str)), None):
        raise RowError("not-text", origin, f"{column!r} is {describe(odd)}")
    if not all(isinstance(each, str) and each.strip() for each in texts):
        raise RowError("empty-text", origin, f"{column!r} is empty")
    return tuple(texts)


def _check_different(origin: str, anchor: str, positives: Sequence[str], negatives: Sequence[str]) -> None:
    near = [text.split() for text in (anchor, *positives)]
    if near[0] in near[1:]:
        raise RowError("equal-texts", origin, "the anchor and its positive are the same")
    if any(text.split() in near for text in negatives):
        raise RowError("equal-texts", origin, "a negative is the anchor, or a positive")


def _no_pairs(origin: str, row: Row) -> DataError:
    got = f"{origin}: rows without two texts to compare, columns {', '.join(map(repr, list(row)[:COLUMNS_NAMED]))}"
    if LABEL in row:
        fix = "where a higher label says that two texts are nearer: --label-field label; else remove the column, and "
        return DataError(got, "what a `label` says of a pair is not known", f"{fix}the pairs that are not near")
    return DataError(got, f"known forms: {FORMS}", "name your columns: --text-field ANCHOR,POSITIVE[,NEGATIVE,..]")


# ---- encoding ------------------------------------------------------------------------------------


def encode_compared(template: ChatTemplate, example: Example) -> list[EncodedExample]:
    """A row of each positive of an example, untruncated, each text as the tokenizer writes it for this model."""
    assert isinstance(example, ComparedExample) and example.text is not None, example
    anchor, *others = (
        encode_texts(template.tokenizer, [text], example.origin)
        for text in (example.text, *example.positives, *example.negatives)
    )
    if not all(map(len, (anchor, *others))):
        raise RowError("empty-text", example.origin, "the tokenizer makes nothing of it")
    positives, negatives = others[: len(example.positives)], others[len(example.positives) :]
    return [ComparedTexts.of([anchor, each, *negatives], score=example.score) for each in positives]


def numbered(rows: Sequence[EncodedExample]) -> EncodedRows:
    """Each row with its number among them."""

    def number_it(number: int, row: EncodedExample) -> EncodedExample:
        assert isinstance(row, ComparedTexts), row
        return replace(row, number=number)

    return ChangedRows(counted(rows), number_it)


# ---- all rows ------------------------------------------------------------------------------------


def has_scores(rows: Iterable[EncodedExample]) -> bool:
    """Whether the first of them has one; then all have, or the audit says so."""
    first = next(iter(rows), None)
    return isinstance(first, ComparedTexts) and first.score is not None


def find_in_compared(train: Sequence[EncodedExample], held_out: Sequence[EncodedExample]) -> list[Finding]:
    """What is wrong with all rows together: some have scores and some not, all have one, or there is one pair alone."""
    scored = has_scores(train)
    strange = (row.origin for rows in (train, held_out) for row in rows if has_scores([row]) != scored)
    findings = find("mixed-scores", strange, "without a score, among others" if scored else "a score, among others")
    if findings or not len(train):
        return findings
    return _find_too_few(train, scored) + _find_alone(held_out, scored)


def _find_alone(held_out: Sequence[EncodedExample], scored: bool) -> list[Finding]:
    """A held-out pair that there is nothing to tell from: its loss is 0 whatever was learnt."""
    alone = len(held_out) == 1 and (scored or len(compared_of(held_out)[0].lengths) == 2)
    return [Finding("one-held-out-pair", 1, (held_out[0].origin,))] if alone else []


def _find_too_few(train: Sequence[EncodedExample], scored: bool) -> list[Finding]:
    if scored:
        first = compared_of(train[:1])[0].score
        same = all(row.score == first for row in train if isinstance(row, ComparedTexts))
        return [Finding("one-score", len(train), (), f"all are {first:g}")] if same else []
    (row,) = compared_of(train[:1])
    return [Finding("one-pair", 1, (row.origin,))] if len(train) == 1 and len(row.lengths) == 2 else []


def describe_compared(train: Sequence[EncodedExample], held_out: Sequence[EncodedExample]) -> list[str]:
    """In words what is learnt from them."""
    if has_scores(train):
        return ["Pairs have scores: which of two pairs is nearer is learnt (CoSENT)."] if len(train) else []
    negatives = sum(len(row.lengths) - 2 for row in train if isinstance(row, ComparedTexts))
    with_them = f"; their rows bring {negatives} negatives" if negatives else ""
    return [f"Each anchor is to be nearest to its own positive among all texts of a step{with_them}."]


COMPARED_ROWS = RowKind(
    RowForms(find_compared_layout, _no_pairs),
    encode_compared,
    several="",
    find=find_in_compared,
    describe=describe_compared,
    documents=2,
    conversations=False,
)


def text_keys(rows: Iterable[ComparedTexts]) -> list[bytes]:
    """A digest of each text of the rows, the same for the same tokens."""
    return [hashlib.blake2b(t.input_ids.numpy().tobytes(), digest_size=16).digest() for row in rows for t in row.texts]
