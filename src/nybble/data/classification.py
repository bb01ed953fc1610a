"""Rows of a text, or of two, and what they are to be told apart by: names of classes, or numbers to be given.

Labels are names or whole numbers (classes), or fractions (a number to be given: regression). A list of them is all the
classes that a text has, none or several. Rows whose tokens have labels are read beside (`token_labels.py`).
"""

import re
from dataclasses import dataclass
from typing import Any

from nybble.data.cells import describe, says_nothing, text_of
from nybble.data.examples import EncodedExample, Example
from nybble.data.field_names import FieldNames
from nybble.data.file_kinds import Row
from nybble.data.labels import describe_labels, find_in_labels
from nybble.data.picture_files import located, stored_picture
from nybble.data.picture_rows import COLUMNS as PICTURES
from nybble.data.picture_rows import PictureExample, PictureProcessor, encode_picture
from nybble.data.prepare import RowKind
from nybble.data.readers import COLUMNS_NAMED, Layout, RowForms
from nybble.data.template import ChatTemplate
from nybble.data.text_encoder import RowError
from nybble.data.text_rows import Label, Labels, encode_texts
from nybble.data.token_labels import (
    TOKEN_FORMS,
    MarkedExample,
    TaggedExample,
    encode_marked,
    encode_tagged,
    find_token_layout,
    is_of_tokens,
)
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
PICTURE_FORMS = f"one of {', '.join(PICTURES)} with one of label, labels; a folder of them, a folder a class"
LABELS = ("label", "labels", "class", "category", "target", "score", "rating")
FORMS = f"{'; '.join('/'.join(columns) for columns in TEXTS)}, each with one of {', '.join(LABELS)}; {TOKEN_FORMS}"
WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,18})")  # `007` is a name
FRACTION = re.compile(r"-?[0-9]+(\.[0-9]+([eE][+-]?[0-9]+)?|[eE]-[0-9]+)")
LARGEST = 3.4e38  # of fp32, in which a number is learnt
MISSING = ("", "-1", "none", "null")  # -1 is what data sets write where a label is withheld


@dataclass(frozen=True)
class LabelledExample(Example):
    """A text, and what it is to be given.

    Args:
        second: the text beside it; "" where there is none.
        label: as a tuple where it may be given several.
    """

    second: str = ""
    label: Label | Labels = ""

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
    picture = next((name for name in PICTURES if name in row), None)
    if texts is None and picture is not None:
        return None if label is None or label not in row else _picture_layout(picture, label, row)
    if texts is None or label not in row or isinstance(row.get(texts[0]), list) or is_of_tokens(label, row):
        return find_token_layout(row, named[0] if named else None, label if texts and label in row else fields.label)
    if len(texts) > 2:
        raise ConfigError(f"text-field names {len(texts)} columns", "allowed: one, or two with a comma between")
    read = _labels if isinstance(row[label], list) else _label

    def build(row: Row, origin: str) -> LabelledExample:
        said = [text_of(row, column, origin) for column in texts]
        if not said[0].strip():
            raise RowError("empty-text", origin, f"{texts[0]!r} is empty")
        return LabelledExample(origin, text=said[0], second="".join(said[1:]), label=read(row[label], label, origin))

    columns = (*texts, label)
    return Layout("labelled", "/".join(columns), columns, (), build, raw=(label,))


def _picture_layout(picture: str, label: str, row: Row) -> Layout:
    read = _labels if isinstance(row[label], list) else _label

    def build(row: Row, origin: str) -> PictureExample:
        stored = located(stored_picture(row[picture], picture, origin), None, origin)
        return PictureExample.of(stored, read(row[label], label, origin), origin)

    return Layout("labelled", f"{picture}/{label}", (picture, label), (), build, raw=(picture, label))


def _label(value: Any, column: str, origin: str) -> Label:
    if isinstance(value, list):
        said = f"{column!r} is {describe(value)}, and the first row's is one label: give each row a list, or none"
        raise RowError("odd-labels", origin, said)
    if says_nothing(value) or str(value).strip().lower() in MISSING:
        raise RowError("missing-label", origin, f"{column!r} is {value!r}")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        value = _number_in(value.strip())
    if isinstance(value, float) and abs(value) > LARGEST:
        raise RowError("missing-label", origin, f"{column!r} is {value:g}, more than numbers of 32 bits hold")
    if not isinstance(value, (int, float, str)):
        raise RowError("missing-label", origin, f"{column!r} is {describe(value)}, no name and no number")
    return value


def _number_in(text: str) -> Label:
    """The number that a text is, as tables without types hold them; else the text."""
    if WHOLE.fullmatch(text):
        return int(text)
    return float(text) if FRACTION.fullmatch(text) else text


def _labels(value: Any, column: str, origin: str) -> Labels:
    """Several labels, in their order; none is allowed."""
    if value is None:
        raise RowError("missing-label", origin, f"{column!r} is null; a text without labels has an empty list")
    if not isinstance(value, list):
        raise RowError("odd-labels", origin, f"{column!r} is {describe(value)}, and the first row's is a list")
    for each in value:
        if isinstance(each, bool) or not isinstance(each, (str, int)) or not str(each).strip():
            raise RowError("odd-labels", origin, f"in {column!r} stands {each!r}, no name and no whole number")
    labels = tuple(each.strip() if isinstance(each, str) else each for each in value)
    if len(set(labels)) < len(labels):
        raise RowError("odd-labels", origin, f"{column!r} names a label twice; vectors of 0 and 1 are not read")
    return labels


def _no_labels(origin: str, row: Row) -> DataError:
    got = f"{origin}: rows without a text and its label, columns {', '.join(map(repr, list(row)[:COLUMNS_NAMED]))}"
    fix = "name your columns: --label-field, and --text-field; two texts beside each other: --text-field a,b"
    return DataError(got, f"known forms: {FORMS}; pictures: {PICTURE_FORMS}", fix)


# ---- encoding ------------------------------------------------------------------------------------


def encode_labelled(template: ChatTemplate, example: Example) -> list[EncodedExample]:
    """The row of a text with its label, untruncated, as the tokenizer writes it for this model."""
    if isinstance(example, PictureExample):
        return [encode_picture(template, example)]
    if isinstance(template.tokenizer, PictureProcessor):
        raise DataError(f"{example.origin}: a text, and the model reads pictures", f"needed: {PICTURE_FORMS}")
    if isinstance(example, TaggedExample):
        return [encode_tagged(template, example)]
    if isinstance(example, MarkedExample):
        return [encode_marked(template, example)]
    assert isinstance(example, LabelledExample) and example.text is not None, example
    texts = [example.text, example.second] if example.second else [example.text]
    row = encode_texts(template.tokenizer, texts, example.origin, label=example.label)
    if not len(row):
        raise RowError("empty-text", example.origin, "the tokenizer makes nothing of it")
    return [row]


LABELLED_ROWS = RowKind(
    RowForms(find_labelled_layout, _no_labels),
    encode_labelled,
    several="",
    find=find_in_labels,
    describe=describe_labels,
    conversations=False,
)
