"""The steps of a run while it trains: one line that moves on a terminal, a line now and then elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL_S = 20.0


class StepLine:
    """The line that shows the progress of steps; it begins with its making.

    Args:
        console: where to write.
        total_steps: of the run.
    """

    def __init__(self, console: Console, total_steps: int):
        self._console, self._total_steps = console, total_steps
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
        self._progress.start()

    def update(self, step: int, figures: str) -> None:
        """Show that `step` is done, and its figures."""
        self._progress.update(self._task, completed=step, figures=figures)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_plain >= PLAIN_INTERVAL_S:
            self._last_plain = now
            self._console.print(f"step {step}/{self._total_steps}  {figures}", highlight=False)

    def stop(self) -> None:
        self._progress.stop()
