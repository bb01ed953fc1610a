"""`nybble eval`."""

from typing import Any

import nybble
from nybble.cli.lazy_terminal import LazyTerminal


def evaluate(given: dict[str, Any]) -> int:
    """Compare a run with its base on held-out rows: losses, answers, what was forgotten; a report and a model card."""
    with LazyTerminal() as listener:
        nybble.evaluate(on_event=listener, **given)
    return 0
