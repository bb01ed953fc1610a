"""What a model that scores texts, or their tokens, says of some that nobody has labelled."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nybble.data.entities import entities_of, say_entities
from nybble.data.picture_files import Stored
from nybble.data.picture_rows import PictureProcessor, picture_row
from nybble.data.text_rows import encode_texts
from nybble.data.token_labels import encode_text, encode_words
from nybble.errors import ConfigError
from nybble.evaluation.classes import scores_of
from nybble.layers.scored import ScoredModel
from nybble.sources.task import Task


def check_asked(given: Sequence[Any], fits: Callable[[Any], bool], needed: str) -> None:
    """Refuse what cannot be asked about.

    Raises:
        ConfigError: it is one by itself, or one of it does not fit.
    """
    if isinstance(given, (str, bytes, Path)):
        raise ConfigError(f"{given!r:.80} stands by itself.", f"Allowed: a list, of {needed} each.", "Put it into one.")
    odd = [each for each in given if not fits(each)]
    if odd:
        raise ConfigError(f"{odd[0]!r:.80} is a {type(odd[0]).__name__} that cannot be asked.", f"Allowed: {needed}.")


def is_text(given: Any) -> bool:
    """Whether it is text."""
    return isinstance(given, str)


def are_texts(given: Any) -> bool:
    """Whether it is a list, or a tuple, of texts."""
    return isinstance(given, (list, tuple)) and all(map(is_text, given))


def classify_texts(
    model: ScoredModel, task: Task, tokenizer: Any, texts: Sequence[str | tuple[str, str]], max_seq_len: int
) -> list[Any]:
    """Of each text, or two beside each other: the likeliest class and its probability; "score" and the number; or, of
    any number of classes, a list of those that are likelier than not.
    """
    check_asked(texts, lambda text: is_text(text) or (are_texts(text) and len(text) == 2), "a text, or a tuple of two")
    pairs = [(text,) if isinstance(text, str) else tuple(text) for text in texts]
    rows = [encode_texts(tokenizer, pair, "text").truncate(max_seq_len) for pair in pairs]
    return _said(task, scores_of(model, rows))


def classify_pictures(
    model: ScoredModel, task: Task, processor: PictureProcessor, pictures: Sequence[Stored]
) -> list[Any]:
    """The same of pictures: paths, or the bytes of files.

    Raises:
        DataError: one cannot be decoded.
    """
    check_asked(pictures, lambda picture: isinstance(picture, (str, bytes, Path)), "the path or the bytes of a file")
    rows = [picture_row(processor, picture, str(picture)[:80]) for picture in pictures]
    return _said(task, scores_of(model, rows))


def _said(task: Task, found: Sequence[Tensor]) -> list[Any]:
    scores = [row[0] for row in found]
    if task.problem == "regression":
        return [(task.labels[0], float(row[0])) for row in scores]
    if task.problem == "multi_label_classification":
        likely = [zip(task.labels, row.sigmoid().tolist(), strict=True) for row in scores]
        return [[(label, p) for label, p in row if p > 0.5] for row in likely]
    likeliest = [row.softmax(dim=0).max(dim=0) for row in scores]
    return [(task.labels[int(found.indices)], float(found.values)) for found in likeliest]


def tag_words(
    model: ScoredModel, task: Task, tokenizer: Any, texts: Sequence[Sequence[str]], max_seq_len: int
) -> list[list[str | None]]:
    """The label of each word; None where it has no token, or none within `max_seq_len`."""
    rows = [encode_words(tokenizer, words, "text").truncate(max_seq_len) for words in texts]
    tagged = []
    for words, row, scores in zip(texts, rows, scores_of(model, rows), strict=True):
        assert row.units is not None
        asked = [unit for unit in row.units.tolist() if unit >= 0]
        labels = dict(zip(asked, _names(task, scores), strict=True))
        tagged.append([labels.get(number) for number in range(len(words))])
    return tagged


def tag_texts(
    model: ScoredModel, task: Task, tokenizer: Any, texts: Sequence[str], max_seq_len: int
) -> list[list[tuple[str, int, int]]]:
    """`(kind, start, end)` of each entity in a text, characters, the end not included; where labels say no entities,
    of each token.
    """
    encoded = [encode_text(tokenizer, text, "text") for text in texts]
    rows = [row.truncate(max_seq_len) for row, _ in encoded]
    found = []
    for (whole, places), scores in zip(encoded, scores_of(model, rows), strict=True):
        assert whole.units is not None
        own = [place for unit, place in zip(whole.units.tolist(), places, strict=True) if unit >= 0]
        labels = _names(task, scores)
        if say_entities(task.labels):
            found.append([(e.kind, own[e.first][0], own[e.last][1]) for e in entities_of(labels)])
        else:
            found.append([(label, *place) for label, place in zip(labels, own, strict=False)])
    return found


def _names(task: Task, scores: Any) -> list[str]:
    return [task.labels[number] for number in scores.argmax(1).tolist()]
