"""The terminal as the listener of a verb, and the pictures that verbs draw."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.errors import ConfigError
from nybble.events import Event

if TYPE_CHECKING:
    from nybble.cli.render import Terminal


class LazyTerminal:
    """Shows events. What shows them takes a second to import, so that comes with the first: a mistake in the options
    is told before.
    """

    @cached_property
    def terminal(self) -> "Terminal":
        from nybble.cli.render import Terminal

        return Terminal()

    def __call__(self, event: Event) -> None:
        self.terminal(event)

    def __enter__(self) -> "LazyTerminal":
        return self

    def __exit__(self, *error: object) -> None:
        if "terminal" in self.__dict__:
            self.terminal.__exit__(*error)


@contextmanager
def plot_errors(plot: Path) -> Iterator[None]:
    """What drawing into the file of --plot raises, as a user's mistake."""
    try:
        yield
    except (OSError, ValueError) as error:  # a suffix that is no picture's raises ValueError
        raise ConfigError(f"{plot} cannot be drawn: {error}.", "--plot takes a file such as lengths.png.") from error
