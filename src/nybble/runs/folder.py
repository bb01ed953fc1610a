"""The folder of a run: what lies where, and writes that are either complete or absent.

config.yaml  base.json  chat_template.jinja  formats.json  data_audit.json  data_rows.safetensors  plan.json
events.jsonl  loss.png  lengths.png  base/  checkpoints/step-N/  adapter/  report/

Nothing heavy is imported here: a second process on the same folder is refused before it loads anything.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nybble.errors import RunError
from nybble.files.disk import TEMPORARY


class RunFolder:
    """Paths inside a run folder.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.base_record = path / "base.json"
        self.chat_template = path / "chat_template.jinja"
        self.audit = path / "data_audit.json"
        self.plan = path / "plan.json"
        self.formats = path / "formats.json"
        self.events = path / "events.jsonl"
        self.loss_plot = path / "loss.png"
        self.lengths_plot = path / "lengths.png"
        self.base = path / "base"
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoints"
        self.data_rows = path / "data_rows.safetensors"
        self.report = path / "report"
        self._lock: int | None = None

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
        if self._holds_something() and not self.config.exists():
            raise RunError(
                f"{self.path} holds files, but no run.",
                "A new run needs an absent or empty folder, or (with --overwrite) one that holds a run.",
                "Choose another --out.",
            )
        existing = next(parent for parent in (self.path, *self.path.absolute().parents) if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise RunError(f"{existing} cannot be written to.", "", "Choose another --out, or change its permissions.")

    def check_resumable(self) -> None:
        """Refuse a folder that holds no run to go on with.

        Raises:
            RunError: there is no config.yaml in it.
        """
        if not self.config.is_file():
            raise RunError(
                f"{self.path} holds no run to go on with.",
                "--resume takes the folder of a run that began to train.",
                "Check --out, or leave --resume out to start a run there.",
            )

    def _holds_something(self) -> bool:
        return self.path.is_dir() and any(not entry.name.startswith(TEMPORARY) for entry in self.path.iterdir())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against every other process, as soon as it exists; the system lets go when this one dies.

        Raises:
            RunError: another process holds it.
        """
        self._hold()
        try:
            yield
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _hold(self) -> None:
        if self._lock is not None or not self.path.is_dir():
            return
        lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise RunError(
                f"Another process is training in {self.path}.",
                "One process at a time works on a run.",
                "Wait for it, stop it, or choose another --out.",
            ) from None
        self._lock = lock

    def create(self, overwrite: bool) -> None:
        """Make the folder; with `overwrite`, what an earlier run left in it goes first.

        Raises:
            RunError: as `check_free`, or the system refuses.
        """
        self.check_free(overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._hold()
            # The folder stays: its lock is on it. Its config goes last: without it the rest would be nobody's.
            for entry in sorted(self.path.iterdir(), key=lambda entry: entry == self.config):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        except OSError as error:
            raise RunError(f"{self.path} cannot be made: {error.strerror}.", "", "Choose another --out.") from error
