"""Pictures as files hold them: which files do, what is wrong with one, and its pixels in red, green and blue."""

import base64
import io
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nybble.data.findings import Finding, find
from nybble.data.text_encoder import RowError
from nybble.files.spool import Spool

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SIXTEEN_BITS = 65535
ANIMATED = "animated"
MOST_SHOWN = 100  # characters of a path
OBJECT = re.compile(r"file <[^>]*>")  # what Pillow calls bytes that lie in memory
ADDRESS = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]*://")
INLINE = re.compile(r"data:[^,]*;base64,")
PROGRAMS = ("EPS",)  # formats that are programs, which Pillow has Ghostscript run

Stored = bytes | str  # a picture's file, or its path


class Decoded(NamedTuple):
    """A picture in red, green and blue, and what had to be done for that: its mode as it was, and whether it moves."""

    image: "Image"
    notes: tuple[str, ...]


def stored_picture(value: Any, column: str, origin: str) -> Stored:
    """What a cell holds: a path, a file's bytes, or both as `datasets` has them.

    Raises:
        RowError: it is none of these.
    """
    if isinstance(value, Mapping) and (value.get("bytes") or value.get("path")):
        own = value.get("bytes")
        value = from_base64(own, origin) if isinstance(own, str) and own else own or value.get("path")
    if isinstance(value, (bytes, str)) and value:
        return value
    raise RowError("missing-picture", origin, f"{column!r} holds no picture: a path, or the bytes of a file, is needed")


def from_base64(text: str, origin: str) -> bytes:
    """A file's bytes as JSON can hold them.

    Raises:
        RowError: the text is no base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise RowError("broken-picture", origin, f"a picture in base64: {error}") from error


def located(stored: Stored, folder: Path | None, origin: str) -> Stored:
    """A file's bytes, or its path from where the command runs.

    Args:
        folder: that a path is from; where the command runs where None.

    Raises:
        RowError: it would have to be fetched, or is no base64.
    """
    if isinstance(stored, bytes):
        return stored
    if ADDRESS.match(stored):
        raise RowError("picture-url", origin, f"{stored[:MOST_SHOWN]}: nothing is fetched from a network")
    if inline := INLINE.match(stored):
        return from_base64(stored[inline.end() :], origin)
    path = os.path.expanduser(stored.removeprefix("file://"))
    return path if folder is None else str(folder / path)


def picture_bytes(stored: Stored, origin: str) -> bytes:
    """The bytes of its file.

    Raises:
        RowError: it cannot be read.
    """
    if isinstance(stored, bytes):
        return stored
    try:
        return _regular_file(Path(os.path.expanduser(stored)))
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        why = getattr(error, "strerror", None) or error
        raise RowError("missing-picture", origin, f"{stored[:MOST_SHOWN]}: {why}") from error


def _regular_file(path: Path) -> bytes:
    """A file's bytes. A pipe or a device may have none, or no end of them.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file of a disk.
    """
    kind = path.stat().st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise ValueError("no file, but a pipe or a device")
    return path.read_bytes()


@cache
def _formats() -> tuple[str, ...]:
    """Those that Pillow decodes itself."""
    from PIL import Image

    Image.init()
    return tuple(name for name in Image.ID if name not in PROGRAMS)


def decode(stored: Stored, origin: str) -> Decoded:
    """The picture, upright as its camera says; of one that moves the first.

    Raises:
        RowError: there is none, it is damaged, or so large that it may be made to fill memory (Pillow's limit).
    """
    from PIL import Image, ImageOps

    file = picture_bytes(stored, origin)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(file), formats=_formats()) as image:
                notes = [] if image.mode == "RGB" else [f"mode {image.mode}"]
                notes += [ANIMATED] if getattr(image, "n_frames", 1) > 1 else []
                image.load()
                return Decoded(_in_colours(ImageOps.exif_transpose(image), origin), tuple(notes))
    except RowError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RowError("huge-picture", origin, str(error).partition(",")[0]) from error
    except Exception as error:  # Pillow's decoders raise whatever their formats make them
        said = OBJECT.sub("it", f"{type(error).__name__}: {error}".splitlines()[0])
        raise RowError("broken-picture", origin, said[:200]) from error


def _in_colours(image: "Image", origin: str) -> "Image":
    """Of 16 bits the upper eight; transparency is dropped, as `datasets` and torchvision do."""
    from PIL import Image

    if image.mode == "F":
        raise RowError("broken-picture", origin, "its pixels are fractions, whose black and white nothing says")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > SIXTEEN_BITS:
            raise RowError("broken-picture", origin, "its pixels have more than 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA", "LA"):
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def find_in_notes(noted: Iterable[tuple[str, Sequence[str]]]) -> list[Finding]:
    """What was done to pictures, by the origins of rows and the notes of their pictures."""
    converted, animated = Spool[str](), Spool[str]()
    modes: Counter[str] = Counter()
    for origin, notes in noted:
        animated.extend([origin] if ANIMATED in notes else [])
        own = [note for note in notes if note != ANIMATED]
        converted.extend([origin] if own else [])
        modes.update(own)
    named = ", ".join(f"{mode} {count}" for mode, count in modes.most_common())
    return find("converted-picture", converted, named) + find("animated-picture", animated)
