"""Pictures in conversations as their owners write them down: parts of a turn, or a column beside marks in the text.

A part is `{"type": "image", "image": ..}`, with `path`, `url` or `bytes` in place of `image`, or OpenAI's `image_url`.
A part without a picture, and `<image>` in a text, are places for the pictures of the row's `images` column, in their
order. Where a row has pictures and no place for one, they stand before the first user's words.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nybble.data.cells import says_nothing, text_of
from nybble.data.examples import Example, Message, Picture
from nybble.data.file_kinds import Row
from nybble.data.picture_files import Stored, located, picture_bytes, stored_picture
from nybble.data.text_encoder import RowError

COLUMNS = ("images", "image")
KINDS = ("image", "image_url")  # of parts
KEYS = ("image", "path", "url", "image_url")  # under which a part has its picture
HARMLESS = ("type", "detail", "cache_control")  # of a part: they change nothing of a picture
MARK = "<image>"


def is_picture(part: Any) -> bool:
    """Whether a part of a turn's content is one."""
    return isinstance(part, Mapping) and part.get("type") in KINDS


def read_parts(content: Any, where: str) -> tuple[str | Picture, ...]:
    """A content's texts and pictures in their order; none where no part is a picture.

    Args:
        content: a list whose parts are texts and pictures, or anything else.
        where: "file:line: turn 3".

    Raises:
        RowError: a picture is none.
    """
    if not isinstance(content, list) or not any(map(is_picture, content)):
        return ()
    return tuple(_picture_of(part, where) if is_picture(part) else text_of(part, "text", where) for part in content)


def unread_of(part: Mapping[str, Any]) -> Iterator[str]:
    """Keys of a picture's part that say something which nothing reads: another picture, sizes that it is to have."""
    read = _key_of(part)
    for key, value in part.items():
        named = key == "path" and read == "bytes"  # where these are from
        if key not in (*HARMLESS, read) and not named and not says_nothing(value):
            yield key


def _key_of(part: Mapping[str, Any]) -> str | None:
    """Under which the part has its picture."""
    return next((key for key in ("bytes", *KEYS) if part.get(key) and not says_nothing(part[key])), None)


def _picture_of(part: Mapping[str, Any], where: str) -> Picture:
    """The part's picture; a place for one where it has none."""
    key = _key_of(part)
    value = None if key is None else {key: part[key]} if key == "bytes" else part[key]
    if isinstance(value, Mapping) and isinstance(value.get("url"), str):
        value = value["url"]
    return Picture(b"" if value is None else stored_picture(value, "image", where.partition(": ")[0]))


def with_pictures(example: Example, row: Row, folder: Path | None) -> Example:
    """The example with its row's pictures in their places, each with a hash of its file.

    Args:
        folder: that the paths of pictures are from; where the command runs where None.

    Raises:
        RowError: places and pictures are not as many; or a picture cannot be read, or would have to be fetched.
    """
    column = next((name for name in COLUMNS if not says_nothing(row.get(name))), None)
    if example.text is not None:
        return example
    if column is None and not any(turn.pictures for turn in example.turns()):
        _refuse_marks(example, row)
        return example
    given = [] if column is None else list(_column(row[column], column, example.origin))
    turns = example.conversation()
    if given:
        turns = tuple(map(_with_places, turns))
        if not any(turn.pictures for turn in turns):
            turns = _in_front(turns, len(given))
    places = sum(not picture.stored for turn in turns for picture in turn.pictures)
    if places != len(given):
        named = f"{len(given)} pictures in {column!r}" if column else "no column of pictures"
        raise RowError("picture-marks", example.origin, f"{places} places for pictures in its turns, and {named}")
    rest = iter(given)
    filled = (replace(turn, parts=tuple(_filled(turn.parts, rest, folder, example.origin))) for turn in turns)
    return replace(example, messages=tuple(filled), prompt=None, completion=None)


def _refuse_marks(example: Example, row: Row) -> None:
    """Refuse marks in a row whose column has no picture for them."""
    column = next((name for name in COLUMNS if name in row), None)
    if column is not None and any(MARK in turn.content for turn in example.turns() if turn.role != "assistant"):
        raise RowError("picture-marks", example.origin, f"places for pictures in its turns, and none in {column!r}")


def _column(value: Any, column: str, origin: str) -> Iterator[Stored]:
    for each in value if isinstance(value, list) else [value]:
        yield stored_picture(each, column, origin)


def _with_places(turn: Message) -> Message:
    """With a place for a picture where its text has the mark; nothing that the assistant says is one."""
    if turn.parts or turn.role == "assistant" or MARK not in turn.content:
        return turn
    parts: list[str | Picture] = []
    for number, text in enumerate(turn.content.split(MARK)):
        parts += [Picture(b"")] if number else []
        parts += [text] if text else []
    return _of_parts(turn, parts)


def _of_parts(turn: Message, parts: Sequence[str | Picture]) -> Message:
    return replace(turn, parts=tuple(parts), content="".join(part for part in parts if isinstance(part, str)))


def _in_front(turns: Sequence[Message], count: int) -> tuple[Message, ...]:
    first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
    places = [Picture(b"")] * count
    return tuple(
        _of_parts(turn, [*places, turn.content]) if number == first else turn for number, turn in enumerate(turns)
    )


def _filled(
    parts: Sequence[str | Picture], rest: Iterator[Stored], folder: Path | None, origin: str
) -> Iterator[str | Picture]:
    for part in parts:
        if isinstance(part, str):
            yield part
        else:
            stored = located(part.stored or next(rest), folder, origin)
            yield Picture(stored, hashlib.sha256(picture_bytes(stored, origin)).hexdigest())
