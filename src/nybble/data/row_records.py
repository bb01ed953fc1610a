"""What was found out once about each row of a run, in a file of its folder: a record a row, under the row's digest.

A record is on the disk as soon as it was found, so that a run which is stopped goes on where it was, and one that is
resumed finds it. It is read from there whenever the row is; in memory are sixteen bytes a row.
"""

import hashlib
import json
import os
import struct
import zlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import FileIO
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from nybble.errors import RunError
from nybble.events import Listener, silent, tracked
from nybble.files.disk import write_complete

ABOUT, RECORDS = "about.json", "rows.bin"
HEAD = struct.Struct("<16sII")  # of a record: the row's digest; bytes of what follows, and its CRC-32
ROWS_AT_ONCE = 64  # that are dealt into micro-batches together


class Located(Protocol):
    """A row that says where it stands."""

    @property
    def origin(self) -> str: ...


Row = TypeVar("Row", bound=Located)


class RowRecords(Generic[Row]):
    """Records of rows in a folder.

    Args:
        folder: that has them; it need not exist yet. What lies there about something else is begun anew.
        about: what the records are about, ready for JSON.
        content_of: a row -> what its record depends on: all that is learnt of it, where nothing else is said.

    Raises:
        RunError: the folder is damaged.
    """

    def __init__(
        self,
        folder: Path,
        about: Mapping[str, Any],
        content_of: Callable[[Row], bytes] = attrgetter("content"),
    ):
        self.about, self._content_of = about, content_of
        self.folder, self._name = folder, folder.name.removesuffix(".partial")  # as it is called once the run trains
        folder.mkdir(parents=True, exist_ok=True)
        if described(folder) != about:
            (folder / RECORDS).write_bytes(b"")
            write_complete(folder / ABOUT, json.dumps(about) + "\n")
        self._file = (folder / RECORDS).open("rb", buffering=0)
        self._keys, self._places = array("q"), array("Q")
        self._end = self._find()
        self._sort()

    def _find(self) -> int:
        """Find the records; where the last whole one ends."""
        size, place = os.fstat(self._file.fileno()).st_size, 0
        while place + HEAD.size <= size:
            digest, length, _ = HEAD.unpack(os.pread(self._file.fileno(), HEAD.size, place))
            if place + HEAD.size + length > size:
                break  # a crash left it half
            self._keys.append(_key(digest))
            self._places.append(place)
            place += HEAD.size + length
        while self._places and self._content_at(self._places[-1]) is None:  # a crash of the system left its pages out
            place = self._places.pop()
            self._keys.pop()
        return place

    def __len__(self) -> int:
        return len(self._places)

    def _sort(self) -> None:
        keys, places = np.array(self._keys, dtype=np.int64), np.array(self._places, dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        self._sorted_keys, self._sorted_places = keys[order], places[order]

    def _digest_of(self, row: Row) -> bytes:
        return hashlib.blake2b(self._content_of(row), digest_size=16).digest()

    def _place_of(self, digest: bytes) -> int | None:
        place = int(np.searchsorted(self._sorted_keys, _key(digest)))
        if place == len(self._sorted_keys) or self._sorted_keys[place] != _key(digest):
            return None
        return int(self._sorted_places[place])

    def unknown(self, rows: Sequence[Row]) -> np.ndarray:
        """Numbers of those rows, int64, of which nothing was known when the file was opened or last asked for."""
        digests = enumerate(map(self._digest_of, rows))
        return np.fromiter((i for i, digest in digests if self._place_of(digest) is None), dtype=np.int64)

    def ask(
        self,
        rows: Sequence[Row],
        answers: Callable[[Sequence[Row]], Iterable[tuple[Row, bytes]]],
        what: str,
        report: Listener = silent,
    ) -> None:
        """Find out what is not known of some rows.

        Args:
            answers: of some of them, each row with its record's content. It is given the same rows together whatever is
                known, so that rounding does not depend on that.
            what: is done, for people.
        """
        with (self.folder / RECORDS).open("r+b", buffering=0) as file:
            file.truncate(self._end)
            try:
                for start in tracked(range(0, len(rows), ROWS_AT_ONCE), what, report):
                    part = rows[start : start + ROWS_AT_ONCE]
                    unknown = {self._digest_of(part[i]) for i in self.unknown(part)}
                    for row, content in answers(part) if unknown else ():
                        if (digest := self._digest_of(row)) in unknown:
                            self._append(file, digest, content)
                            unknown.remove(digest)
            finally:
                os.fsync(file.fileno())
                self._sort()

    def _append(self, file: FileIO, digest: bytes, content: bytes) -> None:
        record = memoryview(HEAD.pack(digest, len(content), zlib.crc32(content)) + content)
        written = 0
        while written < len(record):  # a disk that is nearly full may take a part
            written += os.pwrite(file.fileno(), record[written:], self._end + written)
        self._keys.append(_key(digest))
        self._places.append(self._end)
        self._end += len(record)

    def read(self, row: Row) -> bytes | None:
        """What is known of a row; None where nothing is.

        Raises:
            RunError: that is damaged.
        """
        digest = self._digest_of(row)
        if (place := self._place_of(digest)) is None:
            return None
        found = self._content_at(place)
        if found is None or found[0] != digest:
            raise RunError(
                f"What {self._name}/{RECORDS} of the run says of {row.origin} is not what was written there.",
                "",
                f"Remove the run's folder {self._name}: what it holds is found out again when the run goes on.",
            )
        return found[1]

    def _content_at(self, place: int) -> tuple[bytes, bytes] | None:
        """A record's digest and content; None where that is not what was written."""
        head = os.pread(self._file.fileno(), HEAD.size, place)
        digest, length, checksum = HEAD.unpack(head.ljust(HEAD.size, b"\0"))
        content = os.pread(self._file.fileno(), length, place + HEAD.size)
        return (digest, content) if len(content) == length and zlib.crc32(content) == checksum else None


def described(folder: Path) -> dict[str, Any] | None:
    """What the records in a folder are about; None where there are none.

    Raises:
        RunError: the file that says it is damaged.
    """
    file = folder / ABOUT
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found
    except (OSError, ValueError) as error:
        fix = f"Remove {folder}: what it holds is found out again."
        raise RunError(f"{file} is damaged: {error!r}.", "", fix) from error


def _key(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little", signed=True)
