"""Rows of JSON: Lines, one document, or objects of several lines each. Every complaint names file:line."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from nybble.data.file_kinds import IsRow, Row, Rows, kind_of
from nybble.data.text_encoder import RowError
from nybble.data.text_files import ESCAPED_BYTE, TextFile, name_byte
from nybble.errors import DataError

WHITE_SPACE = re.compile(r"[ \t\r\n]*")
MAX_DIGITS = 4300  # of a whole number; Python converts no longer ones


def read_json(file: TextFile, is_row: IsRow) -> tuple[Rows, list[str]]:
    """JSON Lines; a list of rows, or an object that holds one; one row alone; or rows of several lines each."""
    head = list(islice((line for line in file.lines() if line.strip()), 2))
    if not head or (len(head) == 2 and _is_json(head[0])):
        return _json_lines(file), file.notices
    text = "".join(file.lines())
    start = _skip(text, 0)
    try:
        whole, end = DECODER.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        if kind_of(file.path) != ".json" or (len(head) == 2 and head[0].lstrip()[0] != "[" and _is_json(head[1])):
            return _json_lines(file), file.notices  # the first line alone is damaged
        file.text()  # a byte that is not of its encoding is the better reason
        raise _not_json(file.name, error) from error
    file.text()  # which refuses bytes that are not of its encoding
    if _skip(text, end) == len(text):
        said = file.notices if kind_of(file.path) == ".json" else file.read_as("one JSON document, not a row a line")
        return _document(file.name, text, whole, is_row), said
    if "\n" in text[start:end]:
        return _documents(file.name, text), file.read_as("rows of several lines each")
    if kind_of(file.path) == ".json":
        raise _not_json(file.name, json.JSONDecodeError("Extra data", text, _skip(text, end)))
    return _json_lines(file), file.notices


def _json_lines(file: TextFile) -> Rows:
    for number, line in enumerate(file.lines(), 1):
        origin = f"{file.name}:{number}"
        if escaped := ESCAPED_BYTE.search(line):
            yield RowError("unreadable-row", origin, name_byte(escaped[0]))
        elif line.strip():
            try:
                yield origin, parse_json(line)
            except ValueError as error:
                yield RowError("unreadable-row", origin, str(error))


def _document(name: str, text: str, whole: Any, is_row: IsRow) -> Rows:
    """The rows of one JSON value."""
    lists = [(key, value) for key, value in whole.items() if _may_be_rows(value)] if isinstance(whole, dict) else []
    if isinstance(whole, list):
        rows, position = whole, text.index("[")
    elif not lists or is_row(whole):
        yield f"{name}:{1 + text.count(chr(10), 0, _skip(text, 0))}", whole
        return
    elif len(lists) == 1:
        rows, position = lists[0][1], _value_position(text, lists[0][0])
    else:
        held = ", ".join(f"{key!r} ({len(value)})" for key, value in lists[:5])
        raise DataError(
            f"{name}: an object holding {len(lists)} lists: {held}",
            "needed: a list of rows, or an object that holds one list of rows",
            "write each list to a file of its own; the rows to learn are --data, held-out ones --validation-data",
        )
    for line, row in zip(_element_lines(text, position), rows, strict=True):
        yield f"{name}:{line}", row


def _may_be_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value[:1])


def _documents(name: str, text: str) -> Rows:
    """Objects one after the other, each over as many lines as it likes; behind a damaged one, reading goes on where a
    line begins with a brace."""
    line, counted, position = 1, 0, _skip(text, 0)
    while position < len(text):
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, position = DECODER.raw_decode(text, position)
            yield f"{name}:{line}", row
        except (ValueError, RecursionError) as error:
            yield RowError("unreadable-row", f"{name}:{line}", _say(error))
            position = text.find("\n{", position + 1) % (len(text) + 1)
        position = _skip(text, position)


def _value_position(text: str, wanted: str) -> int:
    """Where the value of a key of the outermost object begins, in valid JSON."""
    position = _skip(text, text.index("{") + 1)
    while True:
        key, position = DECODER.raw_decode(text, position)
        position = _skip(text, _skip(text, position) + 1)  # behind ':'
        if key == wanted:
            return position
        _, position = DECODER.raw_decode(text, position)
        position = _skip(text, _skip(text, position) + 1)  # behind ','


def _element_lines(text: str, start: int) -> Iterator[int]:
    """The line on which each element of the list at text[start] begins, in valid JSON."""
    line, counted, position = 1, 0, _skip(text, start + 1)
    while text[position] != "]":
        line += text.count("\n", counted, position)
        counted = position
        yield line
        _, position = DECODER.raw_decode(text, position)
        position = _skip(text, position)
        if text[position] == ",":
            position = _skip(text, position + 1)


def _skip(text: str, position: int) -> int:
    match = WHITE_SPACE.match(text, position)
    assert match is not None
    return match.end()


def parse_json(text: str) -> Any:
    """JSON in which no object has the same key twice. Whole numbers that are too long to count with stay text.

    Raises:
        ValueError: it is none, in words for the user.
    """
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(_say(error)) from error


def _is_json(line: str) -> bool:
    try:
        parse_json(line)
    except ValueError:
        return False
    return True


def _not_json(name: str, error: Exception) -> DataError:
    place = f"{name}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else name
    return DataError(f"{place}: {_say(error)}", "needed: a list of rows, or one JSON object a line")


def _say(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    return f"not JSON: {error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return row


DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_int=lambda digits: int(digits) if len(digits) < MAX_DIGITS else digits
)
