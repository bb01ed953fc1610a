"""`events.jsonl`: what happened in a run, one JSON object a line, written as it happens."""

import errno
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nybble.events import Event, Progress

PROGRESS_EVERY_S = 1.0  # lines of progress come no faster


class EventLog:
    """A listener that appends events of some kind to a file; each line is the system's before `write` returns."""

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("ab", buffering=0)
        self._last_progress = -math.inf

    def __call__(self, event: Event) -> None:
        if event.kind and not (isinstance(event, Progress) and self._too_soon(event)):
            self.write(event.kind, **event.fields())

    def _too_soon(self, progress: Progress) -> bool:
        now = time.monotonic()
        if 0 < progress.done < progress.total and now - self._last_progress < PROGRESS_EVERY_S:
            return True
        self._last_progress = now
        return False

    def write(self, event: str, **fields: Any) -> None:
        """Append `{"event": event, ...}`. JSON has no NaN, so non-finite numbers become strings."""
        named = {"event": event} | {key: _json_number(value) for key, value in fields.items()}
        self._append((json.dumps(named, allow_nan=False) + "\n").encode())

    def sync(self) -> int:
        """Flush what was written to the disk; returns the length of the log in bytes."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def continue_in(self, path: Path, num_bytes: int) -> None:
        """Go on in the log at `path`, behind its first `num_bytes` and a copy of what was written so far."""
        rewind_events(path, num_bytes)
        self.close()
        written, self._path = self._path.read_bytes(), path
        self._file = path.open("ab", buffering=0)
        self._append(written)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, lines: bytes) -> None:
        if self._file.write(lines) < len(lines):  # a disk that is full takes the beginning
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))


def _json_number(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_number(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_number(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def rewind_events(path: Path, num_bytes: int) -> None:
    """Take back what was written after the first `num_bytes` of a log, and a line that a crash left half."""
    if not path.exists():
        return
    with path.open("r+b") as log:
        kept = log.read(num_bytes)
        log.truncate(kept.rfind(b"\n") + 1)


def read_events(path: Path, event: str | None = None) -> Iterator[dict[str, Any]]:
    """The events of one kind, or all, in order."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if event in (None, record["event"]):
                yield record
