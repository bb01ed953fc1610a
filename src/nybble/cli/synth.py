"""`nybble synth`."""

from typing import Any

import nybble
from nybble.cli.lazy_terminal import LazyTerminal


def synth(given: dict[str, Any]) -> int:
    """Write a model of a published shape with random weights in four bits, to rehearse memory and time with."""
    with LazyTerminal() as listener:
        nybble.synth(on_event=listener, **given)
    return 0
