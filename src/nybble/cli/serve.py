"""`nybble serve`."""

from typing import Any

from rich.console import Console

from nybble.config import ServeConfig
from nybble.options import build_options


def serve(given: dict[str, Any]) -> int:
    """Serve runs to programs that speak OpenAI's API."""
    config = build_options(ServeConfig, given)
    from nybble.serving.server import serve as run_server

    return run_server(config, Console())
