"""Rows of tables (CSV and what spreadsheets make of it), and of plain text."""

import csv
import re
from collections import Counter
from itertools import islice

from nybble.data.file_kinds import IsRow, Rows, kind_of
from nybble.data.text_encoder import RowError
from nybble.data.text_files import ESCAPED_BYTE, TextFile, name_byte
from nybble.errors import DataError

STRETCH = 2000  # characters of a text file that make a row, whole paragraphs where they are shorter
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def read_csv(file: TextFile, is_row: IsRow) -> tuple[Rows, list[str]]:
    """A table whose first line is its heading. Spreadsheets of many countries separate columns by semicolons."""
    own = "\t" if kind_of(file.path) == ".tsv" else ","
    head = [*islice(file.lines(""), 2), "", ""][:2]
    stated = re.fullmatch(r"sep=(.)\s*", head[0])  # Excel's own line before the heading
    delimiter = stated[1] if stated else _delimiter(head[0], own, is_row)
    said = [f"{file.name}: its columns are separated by {DELIMITERS.get(delimiter, repr(delimiter))}."]
    return _csv_rows(file, delimiter, 1 if stated else 0), file.notices + said * (delimiter != own)


def _delimiter(heading: str, own: str, is_row: IsRow) -> str:
    """What separates the columns of a heading: what makes a known row of it, else what makes columns at all."""

    def rank(delimiter: str) -> tuple[bool, bool, bool, int]:
        try:
            columns = next(csv.reader([heading], delimiter=delimiter), [])
        except csv.Error:
            return False, False, False, 0
        return is_row(dict.fromkeys(columns, "")), len(columns) > 1, delimiter == own, len(columns)

    csv.field_size_limit(2**31 - 1)
    return max(DELIMITERS, key=rank)


def _csv_rows(file: TextFile, delimiter: str, skipped: int) -> Rows:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(islice(file.lines(""), skipped, None), delimiter=delimiter, strict=True)
    columns: list[str] = []
    while True:
        origin = f"{file.name}:{skipped + reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if not columns or "end of data" in str(error):  # an open quote has swallowed all that follows
                raise DataError(f"{origin}: not CSV: {error}", "needed: a quote that closes what it opens") from error
            yield RowError("unreadable-row", origin, f"not CSV: {error}")
            continue
        if cells is None:
            return
        if not columns:
            columns = _check_heading(origin, cells)
        elif escaped := ESCAPED_BYTE.search("".join(cells)):
            yield RowError("unreadable-row", origin, name_byte(escaped[0]))
        elif cells and len(cells) != len(columns):
            cause = f"{len(cells)} columns; the heading has {len(columns)} (a cell that holds a delimiter is quoted)"
            yield RowError("unreadable-row", origin, cause)
        elif cells:
            yield origin, dict(zip(columns, cells, strict=True))


def _check_heading(origin: str, columns: list[str]) -> list[str]:
    repeated = sorted(column for column, count in Counter(columns).items() if count > 1)
    if repeated:
        raise DataError(f"{origin}: column {repeated[0]!r} stands in the heading twice", "needed: each name once")
    if escaped := ESCAPED_BYTE.search("".join(columns)):
        raise DataError(f"{origin}: {name_byte(escaped[0])}", "needed: UTF-8", "save the file as UTF-8")
    return columns


def read_text(file: TextFile, is_row: IsRow) -> tuple[Rows, list[str]]:
    """Text to continue, as rows of a column `text`."""
    said = f"whole lines, some {STRETCH:,} characters a row, paragraphs kept together; each row ends in the end token"
    return _stretches(file), file.read_as(said)


def _stretches(file: TextFile) -> Rows:
    """Whole lines, up to an empty one behind `STRETCH` characters or to any behind twice as many."""
    lines: list[str] = []
    start, size = 1, 0
    for number, line in enumerate(file.lines(), 1):
        lines.append(line)
        size += len(line)
        if size >= 2 * STRETCH or (size >= STRETCH and not line.strip()):
            yield from _stretch(file.name, start, "".join(lines))
            lines, start, size = [], number + 1, 0
    yield from _stretch(file.name, start, "".join(lines))


def _stretch(name: str, line: int, text: str) -> Rows:
    if escaped := ESCAPED_BYTE.search(text):
        yield RowError("unreadable-row", f"{name}:{line}", name_byte(escaped[0]))
    elif text.strip():
        yield f"{name}:{line}", {"text": text.strip("\r\n")}
