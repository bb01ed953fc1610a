"""What a user sees while a run trains: one progress line on a terminal, a line now and then elsewhere."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nybble.units import format_bytes

_PLAIN_INTERVAL_S = 20.0


class Display:
    """Shows the steps of a run. A context manager: the progress line lives inside it.

    Args:
        console: where to write.
        total_steps: of the run.
    """

    def __init__(self, console: Console, total_steps: int):
        self.console, self.total_steps = console, total_steps
        self._last_plain = time.monotonic()
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=total_steps, figures="")

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stepped(self, record: dict[str, Any]) -> None:
        """Show a step event's figures."""
        figures = (
            f"loss {record['loss']:.4f}  {record['tokens_per_s']:.0f} tokens/s  {format_bytes(record['memory_bytes'])}"
        )
        self._progress.update(self._task, completed=record["step"], figures=figures)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._last_plain >= _PLAIN_INTERVAL_S:
            self._last_plain = now
            self.console.print(f"step {record['step']}/{self.total_steps}  {figures}", highlight=False)

    def note(self, sentence: str) -> None:
        """Say something that the user should know."""
        self.console.print(sentence, highlight=False, markup=False)

    def evaluated(self, step: int, loss: float) -> None:
        """Show a held-out loss."""
        when = "before training" if step == 0 else f"after step {step}"
        self.console.print(f"held-out loss {when}: {loss:.4f} nats per supervised token", highlight=False)
