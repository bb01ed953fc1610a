"""The folder of a run: what lies where, and writes that are either complete or absent.

config.yaml  data_audit.json  plan.json  events.jsonl  loss.png  checkpoints/step-N/  adapter/
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nybble.errors import RunError


class RunFolder:
    """Paths inside a run folder.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.audit = path / "data_audit.json"
        self.plan = path / "plan.json"
        self.events = path / "events.jsonl"
        self.loss_plot = path / "loss.png"
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoints"

    def check_free(self, overwrite: bool) -> None:
        """Refuse a folder that cannot take a new run, before any long work; nothing is touched.

        Raises:
            RunError: it holds a run and `overwrite` is false, holds something else, or cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file.", "--out takes a folder.", "Choose another --out.")
        if self.config.exists() and not overwrite:
            raise RunError(
                f"{self.path} already holds a run.",
                "A new run needs a folder without one.",
                "Choose another --out, or add --overwrite to replace the run.",
            )
        if self.path.is_dir() and any(self.path.iterdir()) and not self.config.exists():
            raise RunError(
                f"{self.path} holds files, but no run.",
                "A new run needs an absent or empty folder, or (with --overwrite) one that holds a run.",
                "Choose another --out.",
            )
        existing = next(parent for parent in (self.path, *self.path.absolute().parents) if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise RunError(f"{existing} cannot be written to.", "", "Choose another --out, or change its permissions.")

    def create(self, overwrite: bool) -> None:
        """Make the folder; with `overwrite`, what an earlier run left in it goes first.

        Raises:
            RunError: as `check_free`, or the system refuses.
        """
        self.check_free(overwrite)
        try:
            if self.config.exists():
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.path} cannot be made: {error.strerror}.", "", "Choose another --out.") from error

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that takes the name `path` once everything in it is on disk.

    Every file is fsynced before the rename and the parent after it, so that a crash leaves the old folder
    or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    yield temporary
    for file in sorted(temporary.rglob("*")):
        _fsync(file)
    _fsync(temporary)
    if path.exists():
        retired = path.with_name(f".old-{path.name}")
        path.rename(retired)
        temporary.rename(path)
        shutil.rmtree(retired)
    else:
        temporary.rename(path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
