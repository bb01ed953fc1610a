"""What one cell of a row holds: text, JSON as text, a number where text is meant, nothing."""

import json
import math
from typing import Any

from nybble.data.file_kinds import Row
from nybble.data.json_rows import parse_json
from nybble.data.text_encoder import RowError
from nybble.errors import DataError


def says_nothing(value: Any) -> bool:
    """Whether a column with this value says as much as no column; NaN is how tables mark an empty cell."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def finite_number(value: Any, column: str, finding: str, origin: str) -> float:
    """The number that a cell is; a table without types has it as text.

    Raises:
        RowError: of this finding, it is none, or not finite.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        got = repr(value) if isinstance(value, (bool, int, float, str)) else describe(value)
        raise RowError(finding, origin, f"{column!r} is {got}")
    return number


def as_text(value: Any) -> Any:
    """A number, or the content of turns that is one, as JSON writes it; all else as it is."""
    if isinstance(value, list):
        return [_turn_as_text(turn) if isinstance(turn, dict) else turn for turn in value]
    return _scalar_as_text(value)


def _turn_as_text(turn: Row) -> Row:
    return {key: _scalar_as_text(said) if key in ("content", "value") else said for key, said in turn.items()}


def _scalar_as_text(value: Any) -> Any:
    finite = isinstance(value, float) and math.isfinite(value)
    return json.dumps(value) if finite or isinstance(value, (bool, int)) else value


def parse_column(text: str, column: str, origin: str) -> Any:
    """What a cell says that holds JSON as text.

    Raises:
        DataError: it is no JSON.
    """
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{origin}: column {column!r}: {error}") from error


def text_of(row: Row, column: str, where: str) -> str:
    """The text in a row's column, or under a turn's key.

    Args:
        where: "file:line", or "file:line: turn 3".

    Raises:
        RowError: it is no text.
    """
    value = row[column]
    origin, _, turn = where.partition(": ")
    name = f"{turn}: {column!r}" if turn else repr(column)
    if not isinstance(value, str):
        raise RowError("not-text", origin, f"{name} is {describe(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            "unreadable-row", origin, f"{name} has half a surrogate pair at character {error.start}"
        ) from error
    return value


def change_of(value: Any, text: Any) -> str:
    """What `as_text` made of a value, in words; the first of the turns that it changed."""
    if not isinstance(value, list):
        return f"{value!r} is read as {text!r}"
    number = next(number for number, (old, new) in enumerate(zip(value, text, strict=True)) if old != new)
    key = next(key for key in value[number] if value[number][key] != text[number][key])
    return f"turn {number + 1}: {change_of(value[number][key], text[number][key])}"


def describe(value: Any) -> str:
    """A value's kind in words, for messages."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    kind = "null" if value is None else kinds.get(type(value), type(value).__name__)
    if isinstance(value, float) and not math.isfinite(value):
        kind = f"{value}, no number that can be written"
    return f"an empty {kind.split()[-1]}" if value in ([], {}) else kind
