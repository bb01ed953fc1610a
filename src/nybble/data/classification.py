"""Rows of a text, or of two, and what they are to be told apart by: names of classes, or numbers to be given.

Labels are names or whole numbers (classes), or fractions (a number to be given: regression). Which classes there are is
known once all rows are read; a model's own names of its classes go before an order of ours.
"""

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from nybble.data.audit import Finding, find
from nybble.data.cells import describe, says_nothing, text_of
from nybble.data.examples import EncodedExample, Example
from nybble.data.field_names import FieldNames
from nybble.data.file_kinds import Row
from nybble.data.prepare import RowKind
from nybble.data.readers import COLUMNS_NAMED, Layout, RowForms
from nybble.data.template import ChatTemplate
from nybble.data.text_encoder import RowError
from nybble.data.text_rows import Label, TextRow, encode_texts
from nybble.errors import ConfigError, DataError

TEXTS = (  # the first that a row has all of
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text", "text_pair"),
    ("question", "sentence"),
    ("query", "passage"),
    *((column,) for column in ("text", "sentence", "content", "document", "review", "comment", "tweet", "input")),
)
LABELS = ("label", "labels", "class", "category", "target", "score", "rating")
TOKEN_LABELS = ("tokens", "ner_tags", "pos_tags", "chunk_tags")
FORMS = f"{'; '.join('/'.join(columns) for columns in TEXTS)}, each with one of {', '.join(LABELS)}"
MISSING = ("", "-1", "none", "null")  # -1 is what data sets write where a label is withheld
CLASSES_NAMED, LABELS_NAMED = 20, 5


@dataclass(frozen=True)
class LabelledExample(Example):
    """A text, and what it is to be given.

    Args:
        second: the text beside it; "" where there is none.
    """

    second: str = ""
    label: Label = ""

    def full_text(self) -> str:
        return f"{self.text}\n{self.second}" if self.second else super().full_text()

    @property
    def content_key(self) -> str:
        """Of the texts alone: the same text is not held out under another label."""
        return Example("", text=self.full_text()).content_key


# ---- reading -------------------------------------------------------------------------------------


def find_labelled_layout(row: Row, fields: FieldNames) -> Layout | None:
    """The layout of a row of texts with a label; None where it is none.

    Raises:
        ConfigError: a column is named that such rows do not have.
    """
    fields.refuse(("prompt", "completion", "messages", "chosen", "rejected"), f"texts with a label: {FORMS}")
    named = None if fields.text is None else tuple(name.strip() for name in fields.text.split(","))
    texts = named or next((columns for columns in TEXTS if all(column in row for column in columns)), None)
    label = fields.label or next((name for name in LABELS if name in row and name not in (texts or ())), None)
    if texts is None or label is None or label not in row:
        return None
    if len(texts) > 2:
        raise ConfigError(f"text-field names {len(texts)} columns", "allowed: one, or two with a comma between")

    def build(row: Row, origin: str) -> LabelledExample:
        said = [text_of(row, column, origin) for column in texts]
        if not said[0].strip():
            raise RowError("empty-text", origin, f"{texts[0]!r} is empty")
        return LabelledExample(origin, text=said[0], second="".join(said[1:]), label=_label(row[label], label, origin))

    columns = (*texts, label)
    return Layout("labelled", "/".join(columns), columns, (), build, raw=(label,))


def _label(value: Any, column: str, origin: str) -> Label:
    if says_nothing(value) or str(value).strip().lower() in MISSING:
        raise RowError("missing-label", origin, f"{column!r} is {value!r}")
    if isinstance(value, list):
        raise DataError(
            f"{origin}: {column!r} is {describe(value)}",
            "a text has one label; several at once (multi-label) are not learnt",
            "give each row one of them",
        )
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return value
    if not isinstance(value, str):
        raise RowError("missing-label", origin, f"{column!r} is {describe(value)}, no name and no number")
    return value.strip()


def _no_labels(origin: str, row: Row) -> DataError:
    got = f"{origin}: rows without a text and its label, columns {', '.join(map(repr, list(row)[:COLUMNS_NAMED]))}"
    if any(column in row for column in TOKEN_LABELS[1:]):
        return DataError(got, "a label of each token (as of named entities) is not learnt, but one of the whole text")
    fix = "name your columns: --label-field, and --text-field; two texts beside each other: --text-field a,b"
    return DataError(got, f"known forms: {FORMS}", fix)


# ---- encoding ------------------------------------------------------------------------------------


def encode_labelled(template: ChatTemplate, example: Example) -> list[EncodedExample]:
    """The row of a text with its label, untruncated, as the tokenizer writes it for this model."""
    assert isinstance(example, LabelledExample) and example.text is not None, example
    texts = [example.text, example.second] if example.second else [example.text]
    row = encode_texts(template.tokenizer, texts, example.origin, label=example.label)
    if not len(row):
        raise RowError("empty-text", example.origin, "the tokenizer makes nothing of it")
    return [row]


# ---- all rows ------------------------------------------------------------------------------------


class Labels:
    """The labels of rows, each different one once.

    Attributes:
        names: the different ones that are no fractions, as they came.
        codes: int32 (rows,): of each row which of `names`; -1 for a fraction.
        numbers: least and largest fraction; None where there are none.
    """

    def __init__(self, rows: Iterable[EncodedExample]):
        known: dict[Label, int] = {}
        codes, low, high = array("i"), math.inf, -math.inf
        for row in rows:
            assert isinstance(row, TextRow), row
            label = row.label
            if isinstance(label, float):
                codes.append(-1)
                low, high = min(low, label), max(high, label)
            else:
                codes.append(known.setdefault(label, len(known)))
        self.names = list(known)
        self.codes = np.frombuffer(codes, dtype=np.int32)
        self.numbers = (low, high) if low <= high else None

    def count(self, label: Label) -> int:
        """Rows that have it."""
        return int((self.codes == self.names.index(label)).sum()) if label in self.names else 0


@dataclass(frozen=True)
class Classes:
    """What rows are told apart by.

    Args:
        counts: training rows of each label, in the labels' order; empty where numbers are to be given.
        held_out: the same of the rows to validate on.
        numbers: least and largest number to be given; None of classes.
    """

    counts: dict[Label, int]
    held_out: dict[Label, int]
    numbers: tuple[float, float] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes."""
        return tuple(map(str, self.counts))


def classes_of(train: Iterable[EncodedExample], validation: Iterable[EncodedExample]) -> Classes:
    """The labels of rows: whole numbers by size, names by the alphabet; none where they are all fractions."""
    learnt, held_out = Labels(train), Labels(validation)
    known = {*learnt.names, *held_out.names}
    if not known:
        return Classes({}, {}, learnt.numbers)
    numeric = all(isinstance(label, int) for label in known)
    order = sorted(known, key=(lambda label: int(label)) if numeric else str)
    return Classes({label: learnt.count(label) for label in order}, {label: held_out.count(label) for label in order})


def find_in_labels(train: Sequence[EncodedExample], validation: Sequence[EncodedExample]) -> list[Finding]:
    """What is wrong with the labels of all rows together."""
    learnt, held_out = Labels(train), Labels(validation)
    fractions = int((learnt.codes < 0).sum() + (held_out.codes < 0).sum())
    others = len(train) + len(validation) - fractions
    if fractions and others:
        odd = fractions <= others  # the rarer kind is named
        parts = ((train, learnt), (validation, held_out))
        strange = [_origins(rows, (labels.codes < 0) == odd) for rows, labels in parts]
        what = "a fraction among names or whole numbers" if odd else "no fraction, among fractions"
        return find("mixed-labels", chain(*strange), what)
    if fractions:
        low, high = learnt.numbers or (0.0, 0.0)
        return [Finding("one-label", len(train), (), f"all are {low:g}")] if low == high else []
    findings = [Finding("one-label", len(train), (), f"all are {learnt.names[0]!r}")] if len(learnt.names) == 1 else []
    unseen = [number for number, label in enumerate(held_out.names) if label not in learnt.names]
    rare = np.flatnonzero(np.bincount(learnt.codes, minlength=1) == 1)
    for finding, rows, labels, which in (
        ("unseen-label", validation, held_out, unseen),
        ("rare-label", train, learnt, rare.tolist()),
    ):
        named = ", ".join(repr(labels.names[number]) for number in which[:LABELS_NAMED])
        findings += find(finding, _origins(rows, np.isin(labels.codes, which)), named)
    return findings


def _origins(rows: Sequence[EncodedExample], concerned: np.ndarray) -> Iterator[str]:
    return (rows[number].origin for number in np.flatnonzero(concerned).tolist())


def describe_labels(train: Sequence[EncodedExample], validation: Sequence[EncodedExample]) -> list[str]:
    """In words which classes there are, and how many rows each has."""
    classes = classes_of(train, validation)
    if classes.numbers is not None:
        low, high = classes.numbers
        return [f"Labels are numbers, from {low:g} to {high:g}: a number is learnt."]
    named = [f"{label} {count} (held out {classes.held_out[label]})" for label, count in classes.counts.items()]
    more = f", and {len(named) - CLASSES_NAMED} more" if len(named) > CLASSES_NAMED else ""
    return [f"{len(named)} classes: {', '.join(named[:CLASSES_NAMED])}{more}."] if named else []


LABELLED_ROWS = RowKind(
    RowForms(find_labelled_layout, _no_labels),
    encode_labelled,
    several="",
    find=find_in_labels,
    describe=describe_labels,
    conversations=False,
)
