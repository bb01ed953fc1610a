"""A folder's manifest: the size and SHA-256 of each of its files, and of itself, so that damage is seen before use.

`write_manifest` comes last when a folder is written, `verify_manifest` first when it is read. The manifest is JSON
in one exact rendering: a file that parses to the same content but differs in a single byte is refused too.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from nybble.errors import FormatError
from nybble.files.disk import fsync

MANIFEST_NAME = "nybble-manifest.json"
VERSION = 1
MAX_MANIFEST_BYTES = 16_000_000


def write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """Hash the files of `folder` and write its manifest, flushed to the disk.

    Args:
        about: what else the manifest vouches for; ready for JSON.
    """
    path = folder / MANIFEST_NAME
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != path
    }
    path.write_bytes(_render({"version": VERSION, "about": dict(about), "files": files}))
    fsync(path)


def verify_manifest(folder: Path) -> dict[str, Any]:
    """Check every file that the manifest names, and the manifest itself; returns its `about`.

    Files that it does not name are nobody's business.

    Raises:
        FormatError: the manifest or a file is missing, damaged or of another size or content.
    """
    manifest = _read_manifest(folder / MANIFEST_NAME)
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise _mismatch(folder, f"{name} is missing")
        if (size := file.stat().st_size) != expected["bytes"]:
            raise _mismatch(folder, f"{name} has {size} bytes where {expected['bytes']} were written")
    for name, expected in manifest["files"].items():
        if (digest := _sha256(folder / name)) != expected["sha256"]:
            raise _mismatch(
                folder, f"{name} has the SHA-256 {digest[:16]}.. where {expected['sha256'][:16]}.. was written"
            )
    about: dict[str, Any] = manifest["about"]
    return about


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError(f"it is larger than {MAX_MANIFEST_BYTES} bytes")
        data = path.read_bytes()
        manifest: dict[str, Any] = json.loads(data)
        del manifest["sha256"]
        if manifest["version"] != VERSION:
            raise ValueError(f"its version is {manifest['version']!r}")
        if _render(manifest) != data:
            raise ValueError("its content is not what was written")
        if not all(_is_inside(name) for name in manifest["files"]):
            raise ValueError("it names a file outside the folder")
    except OSError as error:
        raise _mismatch(path.parent, f"{path.name} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _mismatch(path.parent, f"{path.name} is damaged ({error})") from error
    return manifest


def _render(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, indent=1, sort_keys=True)
    return (json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest()} | content, indent=1) + "\n").encode()


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and ".." not in parts and not name.startswith("/") and "\\" not in name


def _sha256(file: Path) -> str:
    """Of the bytes as the disk has them: what the system still holds of the file in memory is dropped first."""
    with open(file, "rb") as stream:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _mismatch(folder: Path, what: str) -> FormatError:
    return FormatError(
        f"{folder} is not as it was written: {what}.",
        f"Its {MANIFEST_NAME} names every file with its size and SHA-256.",
        "Use another copy. If the files were changed on purpose, and you trust them, remove the manifest.",
    )
