"""`nybble serve`: load the runs, check who may come in, and listen."""

import importlib.util
import ipaddress
import os
from dataclasses import dataclass

from nybble.errors import ConfigError
from nybble.events import Event, Listener, silent
from nybble.options.use_groups import ServerOptions
from nybble.options.verbs import ServeConfig

TOKEN_VARIABLE = "NYBBLE_TOKEN"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
SHUTDOWN_S = 5  # that running answers are given when the server is told to stop


@dataclass(frozen=True)
class ServerReady(Event):
    """The server is about to answer: for which models, and where."""

    models: tuple[str, ...]
    url: str


def serve(config: ServeConfig, report: Listener = silent) -> None:
    """Serve until interrupted.

    Raises:
        ConfigError: starlette and uvicorn are missing, or the address is open to others and there is no token.
    """
    check_installed()
    machine, server = config.machine, config.server
    token = choose_token(server)
    import uvicorn

    from nybble.serving.app import Api, make_app
    from nybble.serving.engine import Engine, load_models

    models = load_models(server.run, machine, report)
    engine = Engine(models, server.max_queue, machine.threads)
    api = Api(engine, token, server.max_new_tokens, server.max_request_bytes, _names(server.image_hosts))
    report(ServerReady(tuple(engine.models), f"http://{server.host}:{server.port}/v1"))
    settings = {"log_level": "warning", "timeout_graceful_shutdown": SHUTDOWN_S, "server_header": False}
    try:
        uvicorn.run(make_app(api, allowed_hosts(server)), host=server.host, port=server.port, **settings)  # type: ignore[arg-type]
    finally:
        engine.stop()


def check_installed() -> None:
    """Refuse to start without the packages that listening needs."""
    missing = [package for package in ("starlette", "uvicorn") if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"`nybble serve` needs {' and '.join(missing)}.",
            "They are not among nybble's own requirements.",
            "Run `pip install starlette uvicorn`.",
        )


def choose_token(server: ServerOptions) -> str | None:
    """What clients must send, from the options or the environment.

    Raises:
        ConfigError: none is given and the address is not this machine's own.
    """
    token = server.token or os.environ.get(TOKEN_VARIABLE) or None
    if token is None and not is_loopback(server.host):
        raise ConfigError(
            f"host is {server.host}, which others can reach, and there is no token.",
            "Without a token only this machine's own address is allowed, such as 127.0.0.1.",
            f"Set {TOKEN_VARIABLE} or --token, or leave --host out.",
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def allowed_hosts(server: ServerOptions) -> list[str]:
    """Names by which clients may reach the server: this machine's, the address it listens on, and those given."""
    given = _names(server.allow_host)
    listening = [] if server.host in ("0.0.0.0", "::") else [server.host]
    return list(dict.fromkeys([*LOOPBACK_NAMES, *listening, *given]))


def _names(listed: str | None) -> list[str]:
    """Names that are separated by commas."""
    return [] if listed is None else [name.strip() for name in listed.split(",")]
