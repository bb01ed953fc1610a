"""The folder of a run: what lies where, and writes that are either complete or absent.

config.yaml  base.json  task.json  chat_template.jinja  formats.json  data_audit.json  data_rows.safetensors  plan.json
events.jsonl  loss.png  lengths.png  lr.png  tracking_id  base/  checkpoints/step-N/  adapter/ or model/
best/  report/  reference/  teacher/  rows/; what trackers leave: tensorboard/  wandb/

Until its training begins a run lies in `.starting/` of its folder, under the same names: its events from the first
second, its rows while they are encoded, its base while it is calibrated, what a teacher says while it is asked. Only
then does an earlier run go, and what lies there takes its place.

Nothing heavy is imported here: a second process on the same folder is refused before it loads anything.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nybble.errors import RunError
from nybble.files.disk import TEMPORARY, fsync
from nybble.runs.events import EventLog

STARTING = ".starting"


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
        self.task = path / "task.json"  # of a model that scores texts: which head stands on it, and what its scores are
        self.events = path / "events.jsonl"
        self.loss_plot = path / "loss.png"
        self.rates_plot = path / "lr.png"  # where --lr auto has tried some
        self.lengths_plot = path / "lengths.png"
        self.base = path / "base"
        self.adapter = path / "adapter"
        self.model = path / "model"  # the whole model, where every weight was trained
        self.best = path / "best"  # what is trained as at the lowest held-out loss, where the run keeps that
        self.checkpoints = path / "checkpoints"
        self.data_rows = path / "data_rows.safetensors"
        self.reference = path / "reference"  # what the reference of preferences says of the rows
        self.teacher = path / "teacher"  # what a teacher says of the rows
        self.encoded = path / "rows"  # as they were encoded, where they are many, until the run has ended
        self.report = path / "report"
        self.tracking_id = path / "tracking_id"  # by which trackers know the run
        self.resumable = path / "base.partial"  # blocks that calibrating has finished, from which the next run goes on
        self.asked_teacher = path / "teacher.partial"  # rows that a teacher was asked about, likewise
        self.encoding = path / "rows.partial"  # rows that were encoded, likewise
        self._lock: int | None = None

    @property
    def half_made(self) -> tuple[Path, ...]:
        """What the next run goes on from, where this one is stopped before it trains."""
        return self.resumable, self.asked_teacher, self.encoding

    def trained(self, full: bool) -> Path:
        """The folder of what was trained: the adapter, or, where every weight was, the whole model."""
        return self.model if full else self.adapter

    def recorded(self) -> dict[str, str]:
        """What `base.json` says: the run's `model`, the base's `fingerprint`, and which `nybble` made it; nothing where
        there is no such file, as in runs from before it was written.

        Raises:
            RunError: it is damaged.
        """
        if not self.base_record.is_file():
            return {}
        try:
            record: dict[str, str] = json.loads(self.base_record.read_text(encoding="utf-8"))
            record["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self.base_record} is damaged: {error!r}.", "", "Restore it, or train again.") from error
        return record

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
        ours = (TEMPORARY, STARTING)
        return self.path.is_dir() and any(not entry.name.startswith(ours) for entry in self.path.iterdir())

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
        import fcntl  # which not every system has, nor needs for --help

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

    @property
    def starting(self) -> "RunFolder":
        """Where the run lies until its training begins."""
        return RunFolder(self.path / STARTING)

    @contextmanager
    def started(self) -> Iterator[None]:
        """Make the folder and `starting` in it, and hold it. In the end what is left of both goes, bar what the next
        run goes on from.

        Raises:
            RunError: another process holds the folder, or the system refuses to make it.
        """
        made = [folder for folder in (self.path, *self.path.absolute().parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.path} cannot be made: {error.strerror}.", "", "Choose another --out.") from error
        self._hold()
        self._clear_starting()
        self.starting.path.mkdir(exist_ok=True)
        try:
            yield
        finally:
            self._clear_starting()
            for folder in made:
                if any(folder.iterdir()):
                    break
                folder.rmdir()

    def _clear_starting(self) -> None:
        folder = self.starting.path
        if folder.is_dir():
            _remove([entry for entry in folder.iterdir() if entry not in self.starting.half_made])
            if not any(folder.iterdir()):
                folder.rmdir()

    def clear(self, overwrite: bool) -> None:
        """Remove what an earlier run left, with `overwrite`; the folder itself stays, since its lock is on it.

        Raises:
            RunError: as `check_free`.
        """
        self.check_free(overwrite)
        entries = (entry for entry in self.path.iterdir() if entry.name != STARTING)
        _remove(sorted(entries, key=lambda entry: entry == self.config))  # last: without it the rest would be nobody's

    def move_in(self, log: EventLog, kept_bytes: int) -> None:
        """Move what lies in `starting` into the folder.

        Args:
            log: of this run, in `starting`.
            kept_bytes: of the log that the folder has, behind which it goes on.
        """
        starting = self.starting
        stay = (starting.events, *starting.half_made)
        entries = (entry for entry in starting.path.iterdir() if entry not in stay)
        for entry in sorted(entries, key=lambda entry: entry != starting.config):  # first: from then on there is a run
            entry.rename(self.path / entry.name)
        log.continue_in(self.events, kept_bytes)
        shutil.rmtree(starting.path)
        fsync(self.path)


def _remove(entries: Iterable[Path]) -> None:
    for entry in entries:
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
