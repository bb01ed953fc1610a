"""What happens, told to whoever listens. Functions return results and report events; nothing below `cli/` prints.

The terminal (`cli/render`) and a run's `events.jsonl` (`runs/events.py`) are listeners of one stream. An event with
contents of its own is a frozen dataclass beside what it tells of.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        kind: under which a run's log records it; empty where it does not.
    """

    kind: ClassVar[str] = ""

    def fields(self) -> dict[str, Any]:
        """What a run's log records of it, ready for JSON; what is None is left out."""
        return {name: value for name, value in vars(self).items() if value is not None}


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """Listens to nothing."""


def all_of(*listeners: Listener) -> Listener:
    """One listener that tells several, in this order."""

    def report(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return report


@dataclass(frozen=True)
class Note(Event):
    """A sentence for the user."""

    kind: ClassVar[str] = "note"
    sentence: str
    warning: bool = False


@dataclass(frozen=True)
class Progress(Event):
    """How far a piece of work has come.

    Args:
        what: is done, such as "loading".
    """

    kind: ClassVar[str] = "progress"
    what: str
    done: int
    total: int


MANY = 20_000  # rows; reading or encoding so many takes seconds


def tracked_rows(rows: Sequence[Item], what: str, report: Listener) -> Iterator[Item]:
    """The rows of a data set, with their progress reported at each hundredth where they are many."""
    stride = max(1, len(rows) // 100)
    for done, row in enumerate(rows, 1):
        yield row
        if len(rows) >= MANY and (done % stride == 0 or done == len(rows)):
            report(Progress(what, done, len(rows)))


def tracked(items: Sequence[Item], what: str, report: Listener) -> Iterator[Item]:
    """The items, with their progress reported: before the first and after each."""
    report(Progress(what, 0, len(items)))
    for done, item in enumerate(items, 1):
        yield item
        report(Progress(what, done, len(items)))
