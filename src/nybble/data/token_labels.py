"""Rows whose tokens have labels: words with a tag each, or a text with the places of its entities.

A word's tag is learnt at the first of its tokens, and not at the others, as transformers' run_ner does. Of a text with
entities each token is learnt: B-X at the first token of an entity of the kind X, I-X at its others, O outside.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from nybble.data.cells import describe, text_of
from nybble.data.entities import BEGINS, GOES_ON, OUTSIDE
from nybble.data.examples import Example
from nybble.data.file_kinds import Row
from nybble.data.readers import Layout
from nybble.data.template import ChatTemplate
from nybble.data.text_encoder import RowError
from nybble.data.text_rows import Label, TextRow, row_of
from nybble.errors import ModelError

WORDS = ("tokens", "words")
TAGS = ("ner_tags", "labels", "tags", "pos_tags", "chunk_tags")
NEVER_OF_TEXTS = ("ner_tags", "pos_tags", "chunk_tags")
SPANS = ("spans", "entities")
SPAN_KINDS = ("label", "entity_group", "entity", "type", "tag")
TOKEN_FORMS = f"{'/'.join(WORDS)} with one of {', '.join(TAGS)}; text with one of {', '.join(SPANS)}"
UNLABELLED = -100  # how data sets mark what has no label


class Span(NamedTuple):
    """Characters `start` up to `end`, the last not included, of one kind."""

    start: int
    end: int
    kind: str


@dataclass(frozen=True)
class TaggedExample(Example):
    """Words and their tags.

    Args:
        tags: of each word; None where it has none.
    """

    words: tuple[str, ...] = ()
    tags: tuple[Label | None, ...] = ()


@dataclass(frozen=True)
class MarkedExample(Example):
    """A text and its entities.

    Args:
        spans: in the order of their places, none overlapping another.
    """

    spans: tuple[Span, ...] = ()


# ---- reading -------------------------------------------------------------------------------------


def find_token_layout(row: Row, text: str | None, label: str | None) -> Layout | None:
    """The layout of a row whose tokens have labels; None where it is none.

    Args:
        text, label: columns that the user names.
    """
    words = text or next((name for name in WORDS if name in row), None)
    if words is not None and isinstance(row.get(words), list):
        tags = label or next((name for name in TAGS if isinstance(row.get(name), list)), None)
        return _tagged_layout(words, tags) if tags is not None and isinstance(row.get(tags), list) else None
    text, spans = text or "text", label or next((name for name in SPANS if name in row), None)
    return _marked_layout(text, spans) if text in row and spans in row and is_of_tokens(spans, row) else None


def is_of_tokens(column: str, row: Row) -> bool:
    """Whether what a column holds can be meant for tokens only: entities, or a list of tags."""
    value = row[column]
    entities = isinstance(value, list) and bool(value) and isinstance(value[0], (dict, list))
    return column in (*NEVER_OF_TEXTS, *SPANS) or entities


def _tagged_layout(words: str, column: str) -> Layout:
    def build(row: Row, origin: str) -> TaggedExample:
        said, tags = row[words], row[column]
        for name, value in ((words, said), (column, tags)):
            if not isinstance(value, list):
                raise RowError("odd-tags", origin, f"{name!r} is {describe(value)}, and a list is needed")
        for number, word in enumerate(said, 1):
            if not isinstance(word, str):
                raise RowError("odd-tags", origin, f"word {number} in {words!r} is {describe(word)}")
        if len(said) != len(tags):
            raise RowError("odd-tags", origin, f"{len(said)} words in {words!r}, {len(tags)} tags in {column!r}")
        text = text_of({words: " ".join(said)}, words, origin)
        if not text.strip():
            raise RowError("empty-text", origin, f"{words!r} has no word")
        read = tuple(_tag(tag, number, column, origin) for number, tag in enumerate(tags, 1))
        if all(tag is None for tag in read):
            raise RowError("missing-label", origin, f"not one word of it has a tag in {column!r}")
        return TaggedExample(origin, text=text, words=tuple(said), tags=read)

    return Layout("labelled", f"{words}/{column}", (words, column), (), build, raw=(words, column))


def _tag(tag: Any, number: int, column: str, origin: str) -> Label | None:
    if tag == UNLABELLED:
        return None
    if isinstance(tag, bool) or not isinstance(tag, (str, int)) or tag == "":
        raise RowError(
            "odd-tags", origin, f"tag {number} in {column!r} is {describe(tag)}, no name and no whole number"
        )
    return tag


def _marked_layout(text: str, column: str) -> Layout:
    def build(row: Row, origin: str) -> MarkedExample:
        said, spans = text_of(row, text, origin), row[column]
        if not said.strip():
            raise RowError("empty-text", origin, f"{text!r} is empty")
        if spans is not None and not isinstance(spans, list):
            raise RowError("odd-span", origin, f"{column!r} is {describe(spans)}, and a list is needed")
        read = sorted(_span(span, number, said, origin) for number, span in enumerate(spans or (), 1))
        for left, right in pairwise(read):
            if right.start < left.end:
                named = (f"{span.kind} at {span.start}-{span.end}" for span in (left, right))
                raise RowError("odd-span", origin, f"{' and '.join(named)} overlap")
        return MarkedExample(origin, text=said, spans=tuple(read))

    return Layout("labelled", f"{text}/{column}", (text, column), (), build, raw=(column,))


def _span(value: Any, number: int, text: str, origin: str) -> Span:
    """White space at its ends left out."""
    parts: tuple[Any, ...] = (None, None, None)
    if isinstance(value, dict):
        kinds = (value[name] for name in SPAN_KINDS if value.get(name) is not None)
        parts = (value.get("start"), value.get("end"), next(kinds, None))
    elif isinstance(value, list) and len(value) == 3:
        parts = tuple(value)
    start, end, kind = parts
    places = all(isinstance(each, int) and not isinstance(each, bool) for each in (start, end))
    if not places or not isinstance(kind, str) or not kind.strip():
        needed = f"start, end and one of {', '.join(SPAN_KINDS)}, or [start, end, label], are needed"
        raise RowError("odd-span", origin, f"span {number} is {str(value)[:80]!r}: {needed}")
    if not 0 <= start < end <= len(text):
        raise RowError("odd-span", origin, f"span {number} is {start}-{end} of a text of {len(text)} characters")
    start, end = _stripped(text, start, end)
    if start == end:
        raise RowError("odd-span", origin, f"span {number} is white space")
    return Span(start, end, kind.strip())


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    """The places of a part of a text without white space at its ends; equal ones where it is nothing else."""
    part = text[start:end]
    start += len(part) - len(part.lstrip())
    return start, start + len(part.strip())


# ---- encoding ------------------------------------------------------------------------------------


def encode_tagged(template: ChatTemplate, example: TaggedExample) -> TextRow:
    """The row of words with tags, untruncated."""
    row = encode_words(template.tokenizer, example.words, example.origin)
    assert row.units is not None
    tags = tuple(UNLABELLED if tag is None else tag for tag in example.tags)
    lacking = torch.tensor([tag is None for tag in example.tags])
    units = torch.where(lacking[row.units.clamp(min=0).long()], -1, row.units)
    if not (units >= 0).any():
        raise RowError("missing-label", example.origin, "the tokenizer makes nothing of the words that have a tag")
    return replace(row, label=tags, units=units)


def encode_words(tokenizer: Any, words: Sequence[str], origin: str) -> TextRow:
    """The row of words, each of which is told apart at its first token.

    All but the first have a space before them, as in a text: some tokenizers write a word otherwise there.

    Raises:
        ModelError: the tokenizer does not say which word a token is of.
    """
    _check_fast(tokenizer)
    spaced = [f" {word}" if number and word else word for number, word in enumerate(words)]
    found = tokenizer(spaced, is_split_into_words=True, return_special_tokens_mask=True, verbose=False)
    units, before = [], None
    for number in found.word_ids():
        units.append(-1 if number is None or number == before else number)
        before = number
    return row_of(found, origin, units=torch.tensor(units, dtype=torch.int32))


def encode_marked(template: ChatTemplate, example: MarkedExample) -> TextRow:
    """The row of a text with entities, untruncated.

    Raises:
        RowError: an entity begins or ends within a token.
    """
    assert example.text is not None
    row, places = encode_text(template.tokenizer, example.text, example.origin)
    assert row.units is not None
    own = {int(unit): place for unit, place in zip(row.units, places, strict=True) if unit >= 0}
    tags = [OUTSIDE] * len(own)
    for span in example.spans:
        inside = [unit for unit, (start, end) in own.items() if start < span.end and span.start < end]
        if not inside:
            raise RowError(
                "odd-span", example.origin, f"{span.kind} at {span.start}-{span.end} has no token of its own"
            )
        for unit in inside:
            start, end = own[unit]
            if start < span.start or span.end < end:
                part = f"{span.kind} at {span.start}-{span.end} begins or ends within the token {start}-{end}"
                raise RowError("odd-span", example.origin, f"{part}, {example.text[start:end]!r}")
            tags[unit] = f"{GOES_ON}-{span.kind}"
        tags[inside[0]] = f"{BEGINS}-{span.kind}"
    return replace(row, label=tuple(tags))


def encode_text(tokenizer: Any, text: str, origin: str) -> tuple[TextRow, list[tuple[int, int]]]:
    """The row of a text each of whose own tokens is told apart, and the characters that each token stands for, white
    space at their ends left out.

    Raises:
        ModelError: the tokenizer does not say that.
    """
    _check_fast(tokenizer)
    found = tokenizer(text, return_special_tokens_mask=True, return_offsets_mapping=True, verbose=False)
    places = [_stripped(text, start, end) for start, end in found["offset_mapping"]]
    own = 1 - torch.tensor(found["special_tokens_mask"], dtype=torch.int32)
    return row_of(found, origin, units=own.cumsum(0, dtype=torch.int32) * own - 1), places


def _check_fast(tokenizer: Any) -> None:
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} does not say which word or character a token is of.",
            "Labels of tokens need a fast tokenizer (tokenizer.json).",
            "Give another with --tokenizer, or choose another model.",
        )
