"""Writes that a crash leaves old or new, never half. Nothing heavy is imported here."""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from nybble.errors import ModelError, NybbleError

TEMPORARY = ".tmp-"  # begins the name of what is being written or removed; what is left of it means nothing
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def disk_errors(
    path: Path,
    error: type[NybbleError] = ModelError,
    allowed: str = "Nothing that looks complete was left.",
    fix: str = "Free space on that disk, or choose another folder.",
    *,
    what: str = "cannot be written",
) -> Iterator[None]:
    """Turns the system's refusal to read or write a file into a message for the user.

    Args:
        path: named where the system names no file.
        what: of a file, what is said of it.
    """
    try:
        yield
    except (OSError, SafetensorError) as refusal:  # the latter is how that library reports it
        name = getattr(refusal, "filename", None) or path
        raise error(f"{name} {what}: {reason_of(refusal)}.", allowed, fix) from refusal


def reason_of(error: Exception) -> str:
    """Why a file could not be read or written, in the system's words, without a full stop."""
    return (getattr(error, "strerror", None) or str(error).partition("\n")[0]).rstrip(".")


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk; a failure is fatal, since the data may be lost."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_complete(path: Path, text: str) -> None:
    """Write a file that a crash leaves old or new."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


@contextmanager
def complete_folder(path: Path, seal: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Yields a temporary folder that takes the name `path` once everything in it is on disk.

    Every file is flushed before the rename and the parent after it.

    Args:
        seal: called with the temporary folder once its files are on the disk, to write and flush a manifest of them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            fsync(file)
        if seal is not None:
            seal(temporary)
        fsync(temporary)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk it is in the way; a second error says nothing
        raise
    if path.exists():
        _exchange(temporary, path)
        shutil.rmtree(temporary)
    else:
        temporary.rename(path)
    fsync(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder; a half removed one no longer has its name."""
    removed = path.with_name(f"{TEMPORARY}{path.name}")
    if removed.exists():
        shutil.rmtree(removed)
    path.rename(removed)
    shutil.rmtree(removed)


def _exchange(first: Path, second: Path) -> None:
    """Swap two names at once where the system can (Linux's renameat2), else one after the other."""
    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "renameat2"):
        names = os.fsencode(first.absolute()), os.fsencode(second.absolute())
        if library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
        if (code := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOSYS):  # not on this file system
            raise OSError(code, os.strerror(code), str(second))
    between = first.with_name(f"{TEMPORARY}old-{second.name}")
    if between.exists():
        shutil.rmtree(between)
    second.rename(between)
    first.rename(second)
    between.rename(first)
