"""From what --data names (files, folders, patterns, hub ids) to rows, each with the place where it stands.

What a file is, is told from its bytes where they tell it: how it is packed, its encoding, JSON Lines or one document, a
table's delimiter. Whatever is not the plainest form is said in a notice. JSON, CSV and text are read with the standard
library, so that every complaint can name file:line; Parquet and hub data sets through `datasets`. A row that cannot be
read is handed on as the error that it is, and reading goes on behind it.
"""

import bz2
import codecs
import csv
import glob
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from nybble.data.text_encoder import RowError
from nybble.errors import DataError

Row = dict[str, Any]
LocatedRow = tuple[str, Any]  # origin, row as parsed
Rows = Iterator[LocatedRow | RowError]
IsRow = Callable[[Row], bool]  # whether an object is one row of a known form

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
WHITE_SPACE = re.compile(r"[ \t\r\n]*")
HELD_OUT_NAME = re.compile(r"(?:^|[^a-z])(?:test|valid|validation|val|dev|eval|heldout|held-out)(?:[^a-z]|$)")
MAX_DIGITS = 4300  # of a whole number; Python converts no longer ones
STRETCH = 2000  # characters of a text file that make a row, whole paragraphs where they are shorter
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
TEXT_SUFFIXES = (".txt", ".md")

ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # how a byte that is not of the file's encoding is decoded
ENCODING_MARKS = {  # longest first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# What is beyond ASCII in text that really is cp1252: letters beside ASCII ones, and the marks of typography.
WESTERN = re.compile("(?<=[A-Za-z])[À-ÖØ-öø-ÿŠŒŽšœžŸ]|[À-ÖØ-öø-ÿŠŒŽšœžŸ](?=[A-Za-z])|[‘’“”„–—…«»]")
NOT_WESTERN = re.compile("[À-ÖØ-öø-ÿŠŒŽšœžŸ]{3,}|[a-z][¡-¬®-³µ¶¸-¿×÷€‚†‡ˆ‰‹•˜™›][a-z]")
OTHER_KINDS = {
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"PK\x03\x04": "a ZIP archive, as Excel workbooks are",
    b"%PDF": "PDF",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"SQLite format 3": "an SQLite database",
}


class RowSource(NamedTuple):
    """One file, or one hub data set.

    Args:
        name: how origins name it.
        notices: what a user should know of how it is read.
    """

    name: str
    rows: Rows
    notices: list[str]


class Found(NamedTuple):
    """The files that one source stands for."""

    paths: list[Path]
    notices: list[str]


def open_sources(sources: Sequence[str], is_row: IsRow) -> list[RowSource]:
    """The files and hub data sets that `sources` name, in their order.

    Args:
        sources: files, folders, patterns such as "parts/*.jsonl", or hub ids "owner/name[:config]".

    Raises:
        DataError: there is no such source, it cannot be read, or a file is named twice.
    """
    found = [None if _is_hub_id(source) else _find_files(source) for source in sources]
    paths = [path for files in found if files for path in files.paths]
    _check_each_once([path.resolve() for path in paths])
    names = Counter(path.name for path in paths)
    opened = []
    for source, files in zip(sources, found, strict=True):
        if files is None:
            opened.append(RowSource(source, _hub_rows(source), [f"{source}: its split 'train' is read."]))
            continue
        own = [_open_file(path, path.name if names[path.name] == 1 else str(path), is_row) for path in files.paths]
        own[0].notices.extend(files.notices)
        opened += own
    return opened


# ---- which files


def _kind(path: Path) -> str:
    """The suffix that says what is in a file, that of the packing aside."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes and suffixes[-1] in PACKED_SUFFIXES
    return "".join(suffixes[-2:-1] if packed else suffixes[-1:])


def _is_hub_id(source: str) -> bool:
    path = Path(source).expanduser()
    return not path.exists() and _kind(path) not in SUFFIXES and HUB_ID.fullmatch(source) is not None


def _find_files(source: str) -> Found:
    path = Path(source).expanduser()
    if path.is_dir():
        return _find_in_folder(source, path)
    if path.exists():
        if _kind(path) not in SUFFIXES:
            raise DataError(f"{source}: a file ending in {path.suffix!r}", f"allowed: {ALLOWED_FILES}")
        return Found([path], [])
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True)) if glob.has_magic(source) else []
    files = [match for match in matches if match.is_file() and _kind(match) in SUFFIXES]
    if files:
        return Found(files, _not_read(source, [match for match in matches if match.is_file() and match not in files]))
    raise DataError(
        f"{source}: no such file" if not glob.has_magic(source) else f"{source}: no file of this pattern",
        f"allowed: {ALLOWED_FILES}, a folder of them, a hub id owner/name, or builtin:pydoc",
        f"looked in {path.parent.resolve()}",
    )


def _find_in_folder(source: str, folder: Path) -> Found:
    """All files of rows in a folder, and in those inside it; its text files where there are no others."""
    inside = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    visible = [path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    rows = [path for path in visible if _kind(path) in SUFFIXES and _kind(path) not in TEXT_SUFFIXES]
    files = rows or [path for path in visible if _kind(path) in SUFFIXES]
    if not files:
        raise DataError(f"{source}: a folder without examples", f"allowed in it: {ALLOWED_FILES}")
    held_out = [path for path in files if HELD_OUT_NAME.search(str(path.relative_to(folder)).lower())]
    if 0 < len(held_out) < len(files):
        raise DataError(
            f"{source}: a folder that holds {held_out[0].name} beside others",
            "needed: examples to train on; held-out ones go to --validation-data",
            f"name the files to train on, as in --data '{folder / 'train*'}'",
        )
    return Found(files, _not_read(source, [path for path in visible if path not in files]))


def _not_read(source: str, paths: Sequence[Path]) -> list[str]:
    return [f"{source}: not read: {', '.join(path.name for path in paths[:5])}."] if paths else []


def _check_each_once(paths: Sequence[Path]) -> None:
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise DataError(f"{twice[0]} is named twice", "needed: each file once", "to weigh it more, raise --epochs")


def _open_file(path: Path, name: str, is_row: IsRow) -> RowSource:
    if _kind(path) == ".parquet":
        return RowSource(name, _parquet_rows(path, name), [])
    file = TextFile(path, name)
    return RowSource(name, *READERS[_kind(path)](file, is_row))


# ---- bytes to text


def _open_zstd(path: Path) -> Any:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


PACKINGS: dict[bytes, tuple[str, Callable[[Path], Any]]] = {
    b"\x1f\x8b": ("gzip", gzip.open),
    b"BZh": ("bzip2", bz2.open),
    b"\xfd7zXZ\0": ("xz", lzma.open),
    b"\x28\xb5\x2f\xfd": ("Zstandard", _open_zstd),
}
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


class TextFile:
    """A text file, packed or not, in the encoding that its bytes show.

    Attributes:
        encoding: UTF-8 unless the bytes show another one.
        notices: what a user should know of that.

    Raises:
        DataError: it cannot be read, is damaged, or is of a kind that is no text.
    """

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self._packing: tuple[str, Callable[[Path], Any]] = ("", lambda path: path.open("rb"))
        with self._bytes() as file:
            head = file.read(16)
        other = next((kind for mark, kind in OTHER_KINDS.items() if head.startswith(mark)), None)
        if other is not None:
            raise DataError(f"{name}: it is {other}, not text", f"allowed: {ALLOWED_FILES}", "name it by what it is")
        self._packing = next((how for mark, how in PACKINGS.items() if head.startswith(mark)), self._packing)
        self.encoding = self._detect_encoding()
        self.notices = []
        if not self.encoding.startswith("utf-8"):
            self.notices.append(f"{name}: its text is not UTF-8; it is read as {self.encoding.upper()}.")

    def lines(self, newline: str = "\n") -> Iterator[str]:
        """Its lines, ends included; bytes that are not of its encoding are escaped (`ESCAPED_BYTE`)."""
        errors = "surrogateescape" if self.encoding.startswith("utf-8") else "strict"
        with self._bytes() as file:
            yield from io.TextIOWrapper(file, self.encoding, errors, newline)

    def text(self) -> str:
        """Read the whole file as text.

        Raises:
            DataError: a byte of it is not of its encoding; the line is named.
        """
        text = "".join(self.lines())
        escaped = ESCAPED_BYTE.search(text)
        if escaped:
            place = f"{self.name}:{text.count(chr(10), 0, escaped.start()) + 1}"
            raise DataError(f"{place}: {_name_byte(escaped[0])}", "needed: UTF-8")
        return text

    @contextmanager
    def _bytes(self) -> Iterator[IO[bytes]]:
        packing, opener = self._packing
        try:
            with opener(self.path) as file:
                yield file
        except UnicodeDecodeError as error:
            raise DataError(f"{self.name}: it begins as {self.encoding.upper()} and goes on as none") from error
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            problem = f"damaged as {packing}" if packing else "it cannot be read"
            raise DataError(f"{self.name}: {problem}: {error}") from error

    def _detect_encoding(self) -> str:
        with self._bytes() as file:
            head = file.read(4)
        for mark, encoding in ENCODING_MARKS.items():
            if head.startswith(mark):
                return encoding
        if len(head) == 4 and head[0] and head[2] and not head[1] and not head[3]:  # ASCII with every second byte 0
            return "utf-16-le"
        if len(head) == 4 and head[1] and head[3] and not head[0] and not head[2]:
            return "utf-16-be"
        return "cp1252" if not self._is_utf8() and self._is_western() else "utf-8"

    def _is_utf8(self) -> bool:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with self._bytes() as file:
            try:
                while chunk := file.read(1 << 20):
                    decoder.decode(chunk)
                decoder.decode(b"", final=True)
            except UnicodeDecodeError:
                return False
        return True

    def _is_western(self) -> bool:
        """Whether it reads as cp1252 (Latin-1 is a part of it), and not as UTF-8 in which some bytes are damaged."""
        with self._bytes() as file:
            content = file.read()
        if any(_is_wide_utf8(line) for line in content.splitlines()):
            return False
        try:
            text = content.decode("cp1252")
        except UnicodeDecodeError:
            return False
        beyond = sum(character > "\x7f" for character in text)
        odd = sum(len(match[0]) for match in NOT_WESTERN.finditer(text))
        return 2 * len(WESTERN.findall(text)) > beyond and 20 * odd <= beyond


def _is_wide_utf8(line: bytes) -> bool:
    """Whether a line is UTF-8 and more than ASCII."""
    try:
        return not line.isascii() and bool(line.decode())
    except UnicodeDecodeError:
        return False


def _name_byte(escaped: str) -> str:
    return f"byte {ord(escaped) - 0xDC00:#04x} is not UTF-8"


# ---- JSON


def _read_json(file: TextFile, is_row: IsRow) -> tuple[Rows, list[str]]:
    """JSON Lines; a list of rows, or an object that holds one; one row alone; or rows of several lines each."""
    head = list(islice((line for line in file.lines() if line.strip()), 2))
    if not head or (len(head) == 2 and _is_json(head[0])):
        return _json_lines(file), file.notices
    text = "".join(file.lines())
    start = _skip(text, 0)
    try:
        whole, end = DECODER.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        if _kind(file.path) != ".json" or (len(head) == 2 and head[0].lstrip()[0] != "[" and _is_json(head[1])):
            return _json_lines(file), file.notices  # the first line alone is damaged
        file.text()  # a byte that is not of its encoding is the better reason
        raise _not_json(file.name, error) from error
    file.text()  # which refuses bytes that are not of its encoding
    if _skip(text, end) == len(text):
        said = "one JSON document, not a row a line"
        return _document(file.name, text, whole, is_row), _if(_kind(file.path) != ".json", file, said)
    if "\n" in text[start:end]:
        return _documents(file.name, text), _if(True, file, "rows of several lines each")
    if _kind(file.path) == ".json":
        raise _not_json(file.name, json.JSONDecodeError("Extra data", text, _skip(text, end)))
    return _json_lines(file), file.notices


def _if(special: bool, file: TextFile, form: str) -> list[str]:
    return [*file.notices, f"{file.name}: read as {form}."] if special else file.notices


def _json_lines(file: TextFile) -> Rows:
    for number, line in enumerate(file.lines(), 1):
        origin = f"{file.name}:{number}"
        if escaped := ESCAPED_BYTE.search(line):
            yield RowError("unreadable-row", origin, _name_byte(escaped[0]))
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


# ---- tables and text


def _read_csv(file: TextFile, is_row: IsRow) -> tuple[Rows, list[str]]:
    """A table whose first line is its heading. Spreadsheets of many countries separate columns by semicolons."""
    own = "\t" if _kind(file.path) == ".tsv" else ","
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
            yield RowError("unreadable-row", origin, _name_byte(escaped[0]))
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
        raise DataError(f"{origin}: {_name_byte(escaped[0])}", "needed: UTF-8", "save the file as UTF-8")
    return columns


def _read_text(file: TextFile, is_row: IsRow) -> tuple[Rows, list[str]]:
    """Text to continue, as rows of a column `text`."""
    said = f"whole lines, some {STRETCH:,} characters a row, paragraphs kept together; each row ends in the end token"
    return _stretches(file), _if(True, file, said)


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
        yield RowError("unreadable-row", f"{name}:{line}", _name_byte(escaped[0]))
    elif text.strip():
        yield f"{name}:{line}", {"text": text.strip("\r\n")}


# ---- through `datasets`


def _parquet_rows(path: Path, name: str) -> Rows:
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs below that, it raises too
    try:
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from ((f"{name}:{number}", row) for number, row in enumerate(rows, 1))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: not readable as Parquet: {error}") from error


def _hub_rows(source: str) -> Rows:
    """The split "train" of a hub data set, streamed."""
    import datasets

    name, _, config = source.partition(":")
    try:
        rows: Iterable[Row] = datasets.load_dataset(name, config or None, split="train", streaming=True)
        yield from ((f"{source}:{number}", row) for number, row in enumerate(rows, 1))
    except ConnectionError as error:
        raise DataError(
            f"{source}: the hub cannot be reached ({error})", f"a hub id needs a network; without one: {ALLOWED_FILES}"
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source}: the hub's data set cannot be read: {error}") from error


READERS: dict[str, Callable[[TextFile, IsRow], tuple[Rows, list[str]]]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    **dict.fromkeys(TEXT_SUFFIXES, _read_text),
}
SUFFIXES = (*READERS, ".parquet")
ALLOWED_FILES = f"files ending in {', '.join(SUFFIXES)}, packed too ({', '.join(PACKED_SUFFIXES)})"
