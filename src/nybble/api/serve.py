"""`nybble.serve`."""

from typing import Any

from nybble.api.keywords import RunLike, as_options
from nybble.events import Listener, silent
from nybble.options.option import build_options
from nybble.options.verbs import ServeConfig


def serve(*run: RunLike, on_event: Listener = silent, **options: Any) -> None:
    """Serve runs on one base to programs that speak OpenAI's API, until Ctrl-C.

    Args:
        run: what `nybble.train` or `nybble.open_run` returned, or the path of a folder; each is a model of its name.
        on_event: told what is loaded, and where the server answers.
        options: the flags of `nybble serve` with underscores.

    Raises:
        NybbleError: an option is wrong, there is no such run, the runs have other bases, the address is open to others
            and there is no token, or starlette and uvicorn are missing.

    Example:
        >>> nybble.serve(run, host="0.0.0.0")
        Traceback (most recent call last):
        nybble.errors.ConfigError: host is 0.0.0.0, which others can reach, and there is no token.
        Without a token only this machine's own address is allowed, such as 127.0.0.1.
        Set NYBBLE_TOKEN or --token, or leave --host out.
    """
    config = build_options(ServeConfig, as_options(({"run": list(run)} if run else {}) | options))
    from nybble.serving.server import serve as run_server

    run_server(config, on_event)
