"""The listener that hands a run's figures to trackers (trackers.py), and keeps their trouble from the run."""

import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from nybble.errors import first_line
from nybble.events import Event, Listener, Note
from nybble.files.disk import write_complete
from nybble.runs.folder import RunFolder
from nybble.training.events import HeldOutLoss, RunMeasured, Step, TrainingBegun, TrainingEnded
from nybble.training.trackers import FINISH_S, TrackedRun, Tracker, make_tracker

SOON_S = 1.0  # a longer wait at the end is said


class Tracking:
    """A listener, and around the run a context manager: in the end trackers take what is left.

    Each tracker is called on a thread of its own, so that the run never waits for it; one that fails is left out from
    then on, which is said once. Figures have the names of `events.jsonl` behind `train/`, `eval/` and `final/`.

    Args:
        names: of trackers.
        project: that they file the run under, where it is not their own choice.
        report: told where the run is tracked, and what fails.

    Raises:
        ConfigError: the library of a tracker is missing or cannot be used.
    """

    def __init__(self, names: Sequence[str], project: str | None, run: RunFolder, report: Listener):
        self._lines = [_Line(name, make_tracker(name)) for name in dict.fromkeys(names)]
        self._project, self._folder, self._report = project, run, report
        self._begun, self._step, self._status = False, 0, "failed"
        self._final: dict[str, Any] = {}

    def __call__(self, event: Event) -> None:
        if not self._lines:
            return
        match event:
            case TrainingBegun():
                self._begin(event)
            case Step() | HeldOutLoss() if self._begun:
                self._log(event)
            case TrainingEnded():
                self._status = "interrupted" if event.interrupted else "finished"
            case RunMeasured():
                self._final = {f"final/{name}": figure for name, figure in event.fields().items()}
        self._say_failures()

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if not self._begun:
            return
        status = self._status if kind is None else "interrupted" if kind is KeyboardInterrupt else "failed"
        for line in self._lines:
            line.call(lambda tracker: tracker.end(self._final, self._step, status))
        self._wait()
        self._say_failures()

    def _begin(self, event: TrainingBegun) -> None:
        run = TrackedRun(self._folder.path, self._id(event.after), self._project, event.options, event.after)
        self._begun, self._step = True, event.after or 0
        for line in self._lines:
            self._report(Note(f"tracked by {line.name}: {line.tracker.place(run)}"))
            line.call(lambda tracker: tracker.begin(run))

    def _id(self, after: int | None) -> str:
        """Of this run folder, written into it; one that is gone on with has kept its own."""
        kept = _read(self._folder.tracking_id) if after is not None else None
        if kept is None:
            kept = uuid.uuid4().hex
            write_complete(self._folder.tracking_id, kept + "\n")
        return kept

    def _log(self, event: Step | HeldOutLoss) -> None:
        figures, of = event.fields(), "train" if isinstance(event, Step) else "eval"
        step = self._step = figures.pop("step")
        named: Mapping[str, float] = {f"{of}/{name}": figure for name, figure in figures.items()}
        for line in self._lines:
            line.call(lambda tracker: tracker.log(named, step))

    def _say_failures(self) -> None:
        for line in self._lines:
            if line.failure is not None and not line.said:
                line.said = True
                why = f"{type(line.failure).__name__}: {first_line(line.failure)}"
                self._report(Note(f"{line.name} no longer tracks the run, which goes on: {why}", warning=True))

    def _wait(self) -> None:
        """Until all have taken what is left, or have had the time for it."""
        deadline = time.monotonic() + FINISH_S
        for line in self._lines:
            if line.ends_within(min(SOON_S, max(0.0, deadline - time.monotonic()))):
                continue
            self._report(Note(f"waiting for {line.name} to take what is left, {FINISH_S} s at most"))
            if not line.ends_within(max(0.0, deadline - time.monotonic())):
                line.said = True
                self._report(Note(f"{line.name} has not taken everything; the run folder has it", warning=True))


class _Line:
    """The calls of one tracker, in their order, on a thread that does not keep the process alive."""

    def __init__(self, name: str, tracker: Tracker):
        self.name, self.tracker = name, tracker
        self.failure: BaseException | None = None
        self.said = False
        self._calls: SimpleQueue[Callable[[Tracker], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)

    def call(self, call: Callable[[Tracker], None]) -> None:
        """Have this done after what was asked before; nothing where something failed."""
        if self.failure is not None:
            return
        if self._thread.ident is None:
            self._thread.start()
        self._calls.put(call)

    def ends_within(self, seconds: float) -> bool:
        """Whether all that was asked is done, or failed, in this time; nothing can be asked any more."""
        self._calls.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call(self.tracker)
            except BaseException as error:  # SystemExit too, which a thread would swallow
                self.failure = error
                return


def _read(path: Path) -> str | None:
    """The id in a file; None where there is none, or it is damaged."""
    with suppress(OSError, UnicodeDecodeError):
        if found := re.fullmatch(r"([0-9a-f]{32})\n", path.read_text()):
            return found[1]
    return None
