"""`nybble serve`."""

from typing import Any

import nybble
from nybble.cli.lazy_terminal import LazyTerminal


def serve(given: dict[str, Any]) -> int:
    """Serve runs to programs that speak OpenAI's API."""
    with LazyTerminal() as listener:
        nybble.serve(on_event=listener, **given)
    return 0
