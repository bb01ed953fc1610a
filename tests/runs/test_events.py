"""`events.jsonl` as a listener."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from nybble.events import Event, Note, Progress, all_of
from nybble.runs import events as events_module
from nybble.runs.events import EventLog
from nybble.training.events import OutOfMemory, RunMeasured


def recorded(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_events_of_a_kind_are_recorded_with_their_fields(tmp_path: Path) -> None:
    log, heard = EventLog(tmp_path / "events.jsonl"), list[Event]()
    measured = RunMeasured(1, 1.0, 1, 1.0, 1.0, 1.0)
    happened = [Note("hello"), OutOfMemory(3, micro_batch_size=2), OutOfMemory(4, paged=True), measured]
    for event in happened:
        all_of(log, heard.append)(event)
    log.close()
    assert heard == happened
    assert recorded(tmp_path / "events.jsonl") == [
        {"event": "note", "sentence": "hello", "warning": False},
        {"event": "out-of-memory", "step": 3, "micro_batch_size": 2},
        {"event": "out-of-memory", "step": 4, "paged": True},
    ]


def test_numbers_that_json_lacks_become_words_however_deep(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Deep(Event):
        kind: ClassVar[str] = "deep"
        content: dict[str, object]

    log = EventLog(tmp_path / "events.jsonl")
    log(Deep({"numbers": [1.5, math.inf], "more": {"one": math.nan}}))
    log.close()
    assert recorded(tmp_path / "events.jsonl") == [
        {"event": "deep", "content": {"numbers": [1.5, "inf"], "more": {"one": "nan"}}}
    ]


def test_progress_is_recorded_about_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000)).__next__
    monkeypatch.setattr(events_module.time, "monotonic", lambda: clock() / 4)
    log = EventLog(tmp_path / "events.jsonl")
    for done in range(11):
        log(Progress("loading", done, 10))
    log.close()
    assert [line["done"] for line in recorded(tmp_path / "events.jsonl")] == [0, 4, 8, 10]
