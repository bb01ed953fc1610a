"""The labels of all rows together: which there are, how many rows have each, and what is wrong with them."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

from nybble.data.entities import is_entity_tag, mean_entities, say_entities, stray_places
from nybble.data.examples import EncodedExample
from nybble.data.findings import Finding, find
from nybble.data.picture_rows import find_in_pictures
from nybble.data.text_rows import Label, Labels, TextRow
from nybble.data.token_labels import UNLABELLED

CLASSES_NAMED, LABELS_NAMED = 20, 5

Form = Literal["one", "several", "tokens"]  # a label a text, any number of them, or one a token


def form_of(row: TextRow) -> Form:
    """How a row is labelled."""
    if row.units is not None:
        return "tokens"
    return "several" if isinstance(row.label, tuple) else "one"


def learnt_labels(row: TextRow) -> Labels:
    """What is learnt of a row: its labels, or those of its labelled tokens."""
    return row.labels if row.units is None else row.token_labels


@dataclass
class LabelCounts:
    """The labels of rows, each different one once.

    Attributes:
        counts: of labels that are no fractions, as they came, how often each is learnt.
        fractions: how many labels are.
        low, high: least and largest of them.
        forms: rows of each form.
        bare: rows that have no label.
    """

    counts: Counter[Label] = field(default_factory=Counter)
    fractions: int = 0
    low: float = math.inf
    high: float = -math.inf
    forms: Counter[Form] = field(default_factory=Counter)
    bare: int = 0

    @classmethod
    def of(cls, rows: Iterable[EncodedExample]) -> "LabelCounts":
        """Of all rows, read once."""
        found = cls()
        for row in text_rows(rows):
            labels = learnt_labels(row)
            found.forms[form_of(row)] += 1
            found.bare += not labels
            for label in labels:
                if isinstance(label, float):
                    found.fractions += 1
                    found.low, found.high = min(found.low, label), max(found.high, label)
                else:
                    found.counts[label] += 1
        return found


def text_rows(rows: Iterable[EncodedExample]) -> Iterator[TextRow]:
    """Rows with labels, as what they are."""
    for row in rows:
        assert isinstance(row, TextRow), row
        yield row


@dataclass(frozen=True)
class Classes:
    """What rows are told apart by.

    Args:
        counts: how often the training rows have each label, in the labels' order; empty where numbers are to be given.
        held_out: the same of the rows to validate on.
        numbers: least and largest number to be given; None of classes.
        form: how rows are labelled.
        bare: rows without a label, to train and to validate on.
    """

    counts: dict[Label, int]
    held_out: dict[Label, int]
    numbers: tuple[float, float] | None = None
    form: Form = "one"
    bare: tuple[int, int] = (0, 0)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes."""
        return tuple(map(str, self.counts))


def classes_of(train: Iterable[EncodedExample], validation: Iterable[EncodedExample]) -> Classes:
    """The labels of rows: whole numbers by size, names by the alphabet; none where they are all fractions."""
    learnt, held_out = LabelCounts.of(train), LabelCounts.of(validation)
    known = {*learnt.counts, *held_out.counts}
    form: Form = next(iter(learnt.forms), "one")
    if not known:
        return Classes({}, {}, (learnt.low, learnt.high) if learnt.fractions else None, form)
    numeric = all(isinstance(label, int) for label in known)
    order = sorted(known, key=(lambda label: int(label)) if numeric else str)
    counts = {label: learnt.counts[label] for label in order}
    others = {label: held_out.counts[label] for label in order}
    return Classes(counts, others, None, form, (learnt.bare, held_out.bare))


# ---- what is wrong -------------------------------------------------------------------------------


def find_in_labels(train: Sequence[EncodedExample], validation: Sequence[EncodedExample]) -> list[Finding]:
    """What is wrong with the labels of all rows together."""
    learnt, held_out = LabelCounts.of(train), LabelCounts.of(validation)
    return _find_in_counts(train, validation, learnt, held_out) + find_in_pictures(chain(train, validation))


def _find_in_counts(
    train: Sequence[EncodedExample], validation: Sequence[EncodedExample], learnt: LabelCounts, held_out: LabelCounts
) -> list[Finding]:
    forms = learnt.forms + held_out.forms
    if len(forms) > 1:
        (common, _), *_ = forms.most_common(1)
        others = _origins(chain(train, validation), lambda row: form_of(row) != common)
        return find("mixed-forms", others, f"most rows are of {FORM_WORDS[common]}")
    fractions = learnt.fractions + held_out.fractions
    others_than = learnt.counts.total() + held_out.counts.total()
    if fractions and others_than:
        odd = fractions <= others_than  # the rarer kind is named
        strange = _origins(
            chain(train, validation), lambda row: any(isinstance(label, float) == odd for label in learnt_labels(row))
        )
        what = "a fraction among names or whole numbers" if odd else "no fraction, among fractions"
        return find("mixed-labels", strange, what)
    if fractions:
        return [Finding("one-label", len(train), (), f"all are {learnt.low:g}")] if learnt.low == learnt.high else []
    findings = _find_too_few(learnt, len(train))
    unseen = {label for label in held_out.counts if label not in learnt.counts}
    rare = {label for label, count in learnt.counts.items() if count == 1}
    findings += _find_having("unseen-label", validation, unseen) + _find_having("rare-label", train, rare)
    return findings + (_find_in_tags(train, validation, learnt, held_out) if forms["tokens"] else [])


FORM_WORDS: dict[Form, str] = {
    "one": "a label each",
    "several": "a list of labels each",
    "tokens": "labels of tokens",
}


def _find_too_few(learnt: LabelCounts, num_rows: int) -> list[Finding]:
    """Where there is nothing to tell apart."""
    if learnt.forms["several"] and not learnt.counts:
        return [Finding("one-label", num_rows, (), "none has a label")]
    if len(learnt.counts) == 1 and not learnt.bare:
        return [Finding("one-label", num_rows, (), f"all are {next(iter(learnt.counts))!r}")]
    return []


def _find_in_tags(
    train: Sequence[EncodedExample], validation: Sequence[EncodedExample], learnt: LabelCounts, held_out: LabelCounts
) -> list[Finding]:
    """What is wrong with tags: those that say no entity among such that do, entities that go on and have not begun,
    words of which the tokenizer makes nothing.
    """
    findings: list[Finding] = []
    tags = {*learnt.counts, *held_out.counts}
    if mean_entities(tags):
        findings += _find_having(
            "unknown-tag", chain(train, validation), {tag for tag in tags if not is_entity_tag(tag)}
        )
    if say_entities(tags):
        findings += find("stray-inside", _origins(chain(train, validation), _is_stray))
    return findings + find("word-without-token", _origins(chain(train, validation), _loses_words))


def _is_stray(row: TextRow) -> bool:
    return next(stray_places([str(label) for label in row.labels]), None) is not None


def _loses_words(row: TextRow) -> bool:
    """Whether a word has a tag and no token, though no token was cut off."""
    if row.units is None or row.num_truncated:
        return False
    return int((row.units >= 0).sum()) < sum(label != UNLABELLED for label in row.labels)


def _find_having(finding: str, rows: Iterable[EncodedExample], which: Collection[Label]) -> list[Finding]:
    """The rows that have one of these labels."""
    if not which:
        return []
    named = ", ".join(map(repr, sorted(which, key=str)[:LABELS_NAMED]))
    return find(finding, _origins(rows, lambda row: any(label in which for label in learnt_labels(row))), named)


def _origins(rows: Iterable[EncodedExample], concerned: Callable[[TextRow], bool]) -> Iterator[str]:
    return (row.origin for row in text_rows(rows) if concerned(row))


# ---- in words ------------------------------------------------------------------------------------


def describe_labels(train: Sequence[EncodedExample], validation: Sequence[EncodedExample]) -> list[str]:
    """In words which classes there are, and how many rows, or tokens, each has."""
    classes = classes_of(train, validation)
    if classes.numbers is not None:
        low, high = classes.numbers
        return [f"Labels are numbers, from {low:g} to {high:g}: a number is learnt."]
    named = [f"{label} {count} (held out {classes.held_out[label]})" for label, count in classes.counts.items()]
    more = f", and {len(named) - CLASSES_NAMED} more" if len(named) > CLASSES_NAMED else ""
    if not named:
        return []
    listed = f"{', '.join(named[:CLASSES_NAMED])}{more}"
    if classes.form == "several":
        bare = f"{classes.bare[0]} (held out {classes.bare[1]}) have none"
        return [f"Texts have any number of {len(named)} labels: {listed}; {bare}."]
    if classes.form == "tokens":
        known = "entities are told" if say_entities(classes.counts) else "they mark no entities (B-X, I-X, O)"
        return [f"Tokens have {len(named)} labels, {known}: {listed}."]
    return [f"{len(named)} classes: {listed}."]
