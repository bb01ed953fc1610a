"""`events.jsonl`: what happened in a run, one JSON object a line, written as it happens."""

import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class EventLog:
    """Appends events to a file; each line is the system's before `write` returns."""

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("ab", buffering=0)

    def write(self, event: str, **fields: Any) -> None:
        """Append `{"event": event, ...}`. JSON has no NaN, so non-finite numbers become strings."""
        named = {"event": event} | {key: _json_number(value) for key, value in fields.items()}
        line = (json.dumps(named, allow_nan=False) + "\n").encode()
        if self._file.write(line) < len(line):  # a disk that is full takes the beginning
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def sync(self) -> int:
        """Flush what was written to the disk; returns the length of the log in bytes."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


def _json_number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def rewind_events(path: Path, num_bytes: int) -> None:
    """Take back what was written after the first `num_bytes` of a log, and a line that a crash left half."""
    if not path.exists():
        return
    with path.open("r+b") as log:
        kept = log.read(num_bytes)
        log.truncate(kept.rfind(b"\n") + 1)


def read_events(path: Path, event: str) -> Iterator[dict[str, Any]]:
    """The events of one kind, in order."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if record["event"] == event:
                yield record
