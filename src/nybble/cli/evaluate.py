"""`nybble eval`."""

from typing import Any

import nybble
from nybble.cli.listening import Listening


def evaluate(given: dict[str, Any]) -> int:
    """Compare a run with its base on held-out rows: losses, answers, what was forgotten; a report and a model card."""
    with Listening() as listener:
        nybble.evaluate(on_event=listener, **given)
    return 0
