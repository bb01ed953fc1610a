"""Which kinds of files hold rows, told from their names, and what all readers of rows share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nybble.data.text_encoder import RowError

Row = dict[str, Any]
LocatedRow = tuple[str, Any]  # origin, row as parsed
Rows = Iterator[LocatedRow | RowError]
IsRow = Callable[[Row], bool]  # whether an object is one row of a known form

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (".csv", ".tsv")
TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, *TEXT_SUFFIXES, ".parquet")
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
ALLOWED_FILES = f"files ending in {', '.join(SUFFIXES)}, packed too ({', '.join(PACKED_SUFFIXES)})"


def kind_of(path: Path) -> str:
    """The suffix that says what is in a file, that of the packing aside."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes and suffixes[-1] in PACKED_SUFFIXES
    return "".join(suffixes[-2:-1] if packed else suffixes[-1:])
