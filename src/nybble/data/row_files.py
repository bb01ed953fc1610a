"""From what --data names (files, folders, patterns, hub ids) to rows, each with the place where it stands.

What a file is, is told from its bytes where they tell it: how it is packed, its encoding, JSON Lines or one document, a
table's delimiter. Whatever is not the plainest form is said in a notice. JSON, CSV and text are read with the standard
library, so that every complaint can name file:line; Parquet and data sets through `datasets`. A row that cannot be read
is handed on as the error that it is, and reading goes on behind it.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from nybble.data.dataset_rows import hub_rows, parquet_rows, saved_rows
from nybble.data.file_kinds import JSON_SUFFIXES, TABLE_SUFFIXES, TEXT_SUFFIXES, IsRow, Rows, kind_of
from nybble.data.json_rows import read_json
from nybble.data.picture_folders import folder_rows
from nybble.data.sources import METADATA, DataSource, check_each_once, find_files
from nybble.data.table_rows import read_csv, read_text
from nybble.data.text_encoder import RowError
from nybble.data.text_files import TextFile

READERS: dict[str, Callable[[TextFile, IsRow], tuple[Rows, list[str]]]] = {
    **dict.fromkeys(JSON_SUFFIXES, read_json),
    **dict.fromkeys(TABLE_SUFFIXES, read_csv),
    **dict.fromkeys(TEXT_SUFFIXES, read_text),
}


class RowFile(NamedTuple):
    """One file, or one data set.

    Args:
        name: how origins name it.
        notices: what a user should know of how it is read.
        text: the file, where it is one of text.
        folder: that it lies in.
    """

    name: str
    rows: Rows
    notices: list[str]
    text: TextFile | None = None
    folder: Path | None = None


def open_sources(sources: Sequence[DataSource], is_row: IsRow) -> list[list[RowFile]]:
    """The files and data sets that each of `sources` names, in their order.

    Raises:
        DataError: there is no such source, it cannot be read, or a file is named twice.
    """
    found = [None if source.on_hub or source.saved else find_files(source, is_row) for source in sources]
    paths = [path for files in found if files for path in files.paths]
    check_each_once([path.resolve() for path in paths])
    names = Counter(path.name for path in paths)
    opened = []
    for source, files in zip(sources, found, strict=True):
        if files is None:
            opened.append([_open_data_set(source)])
            continue
        if files.pictures:
            opened.append([RowFile(source.given, folder_rows(files.paths[0], files.pictures), files.notices)])
            continue
        own = [_open_file(path, path.name if names[path.name] == 1 else str(path), is_row) for path in files.paths]
        own[0].notices.extend(files.notices)
        opened.append(own)
    return opened


def _open_data_set(source: DataSource) -> RowFile:
    if source.saved:
        return RowFile(source.given, saved_rows(source), [])
    said = [f"{source.name}: its split 'train' is read."] if source.split is None else []
    return RowFile(source.given, hub_rows(source), said)


def _open_file(path: Path, name: str, is_row: IsRow) -> RowFile:
    if kind_of(path) == ".parquet":
        return RowFile(name, parquet_rows(path, name), [], folder=path.parent)
    file = TextFile(path, name)
    rows, notices = READERS[kind_of(path)](file, is_row)
    return RowFile(name, _beside(path, rows) if path.stem == METADATA else rows, notices, file, path.parent)


def _beside(path: Path, rows: Rows) -> Rows:
    """The rows of a file that names the pictures beside it by their paths from there (`file_name`)."""
    for located in rows:
        if not isinstance(located, RowError) and isinstance(located[1], dict) and "file_name" in located[1]:
            origin, row = located
            located = origin, row | {"file_name": str(path.parent / str(row["file_name"]))}
        yield located
