"""A text file, packed or not, in the encoding that its bytes show."""

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

from nybble.data.file_kinds import ALLOWED_FILES
from nybble.errors import DataError

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


def _open_zstd(path: Path) -> Any:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


PACKINGS: dict[bytes, tuple[str, Callable[[Path], Any]]] = {
    b"\x1f\x8b": ("gzip", gzip.open),
    b"BZh": ("bzip2", bz2.open),
    b"\xfd7zXZ\0": ("xz", lzma.open),
    b"\x28\xb5\x2f\xfd": ("Zstandard", _open_zstd),
}


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
        self._read: IO[bytes] | None = None
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
            self._read = file
            yield from io.TextIOWrapper(file, self.encoding, errors, newline)

    @property
    def progress(self) -> tuple[int, int] | None:
        """Bytes that `lines` has come to, and all of them; None of a packed file, or where none is being read."""
        if self._packing[0] or self._read is None or self._read.closed:
            return None
        return self._read.tell(), self.path.stat().st_size

    def text(self) -> str:
        """Read the whole file as text.

        Raises:
            DataError: a byte of it is not of its encoding; the line is named.
        """
        text = "".join(self.lines())
        escaped = ESCAPED_BYTE.search(text)
        if escaped:
            place = f"{self.name}:{text.count(chr(10), 0, escaped.start()) + 1}"
            raise DataError(f"{place}: {name_byte(escaped[0])}", "needed: UTF-8")
        return text

    def read_as(self, form: str) -> list[str]:
        """Its notices, and that it is not read in the plainest form."""
        return [*self.notices, f"{self.name}: read as {form}."]

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
        odd = beyond = western = 0
        with self._bytes() as file:
            for line in chain.from_iterable(map(bytes.splitlines, file)):
                if _is_wide_utf8(line):
                    return False
                try:
                    text = line.decode("cp1252")
                except UnicodeDecodeError:
                    return False
                beyond += sum(character > "\x7f" for character in text)
                western += len(WESTERN.findall(text))
                odd += sum(len(match[0]) for match in NOT_WESTERN.finditer(text))
        return 2 * western > beyond and 20 * odd <= beyond


def _is_wide_utf8(line: bytes) -> bool:
    """Whether a line is UTF-8 and more than ASCII."""
    try:
        return not line.isascii() and bool(line.decode())
    except UnicodeDecodeError:
        return False


def name_byte(escaped: str) -> str:
    return f"byte {ord(escaped) - 0xDC00:#04x} is not UTF-8"
