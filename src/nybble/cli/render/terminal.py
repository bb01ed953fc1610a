"""The terminal as a listener of events: each is shown in the way that belongs to its type."""

import re
from collections.abc import Collection, Iterable, Sequence
from functools import singledispatch
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import Progress
from rich.segment import Segment
from rich.table import Column, Table

from nybble import events
from nybble.cli.render.step_line import StepLine

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def shown(text: str) -> str:
    """A text with its control characters written as escapes: a terminal acts on these, and files hold any."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class SafeConsole(Console):
    """A console that no text can talk to its terminal through: all that is shown passes here, in pieces. What goes into
    a file or a pipe stays as it is.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        safe = not self.is_terminal
        for piece in super().render(renderable, options):
            yield piece if safe or piece.control else piece._replace(text=shown(piece.text))


class Terminal:
    """Shows events on a console. A context manager: no bar stays when it is left.

    Args:
        console: where to; the process's own output if None.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or SafeConsole(markup=False)  # labels and names may hold brackets
        self.steps: StepLine | None = None
        self._work = ""
        self._bar: Progress | None = None

    def __call__(self, event: events.Event) -> None:
        if not isinstance(event, events.Progress):
            self._end_work()
        show(event, self)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error: object) -> None:
        self._end_work()
        self.end_steps()

    def say(self, sentence: str, **options: Any) -> None:
        """Print plain text; `options` are those of `Console.print`."""
        self.console.print(sentence, highlight=False, markup=False, **options)

    def work(self, what: str, done: int, total: int) -> None:
        """Move the bar of a piece of work; it goes once that is done, and anything else that happens ends it."""
        if self._bar is None or self._work != what:
            self._end_work()
            self._bar = Progress(console=self.console, transient=True, disable=not self.console.is_terminal)
            self._bar.start()
            self._bar.add_task(what, total=total)
            self._work = what
        self._bar.update(self._bar.task_ids[0], completed=done)
        if done == total:
            self._end_work()

    def end_steps(self) -> None:
        """Leave the line of training steps as it is."""
        if self.steps is not None:
            self.steps.stop()
        self.steps = None

    def _end_work(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = None


def new_table(title: str, columns: Sequence[str], right: Collection[str] = ()) -> Table:
    """A table with these headings; the columns named in `right` hold figures, which stand on the right."""
    headings = [Column(name, justify="right" if name in right else "left") for name in columns]
    return Table(*headings, title=title, title_justify="left")


@singledispatch
def show(event: events.Event, terminal: Terminal) -> None:
    """Show an event; every type of event has an implementation, which may do nothing."""
    raise NotImplementedError(type(event).__name__)


@show.register
def _(event: events.Note, terminal: Terminal) -> None:
    terminal.say(event.sentence, style="yellow" if event.warning else None)


@show.register
def _(event: events.Progress, terminal: Terminal) -> None:
    terminal.work(event.what, event.done, event.total)
