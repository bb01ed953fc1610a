"""`nybble serve`."""

from typing import Any

from rich.console import Console

from nybble.options.option import build_options
from nybble.options.verbs import ServeConfig


def serve(given: dict[str, Any]) -> int:
    """Serve runs to programs that speak OpenAI's API."""
    config = build_options(ServeConfig, given)
    from nybble.serving.server import serve as run_server

    return run_server(config, Console())
