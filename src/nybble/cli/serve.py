"""`nybble serve`."""

from typing import Any

from nybble.options.option import build_options
from nybble.options.verbs import ServeConfig


def serve(given: dict[str, Any]) -> int:
    """Serve runs to programs that speak OpenAI's API."""
    config = build_options(ServeConfig, given)
    from nybble.cli.render import Terminal
    from nybble.serving.server import serve as run_server

    with Terminal() as terminal:
        run_server(config, terminal)
    return 0
