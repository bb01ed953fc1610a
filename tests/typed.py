"""`nybble` as it is typed, in this process."""

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from typer.main import get_command
from typer.testing import CliRunner, Result


@cache
def _command() -> Any:
    """All verbs with their flags, made once: CliRunner.invoke makes them each time, in 40 ms."""
    from nybble.cli.main import app

    return get_command(app)


def typed(arguments: Sequence[object], stdin: str | None = None, env: Mapping[str, str] | None = None) -> Result:
    """What `nybble` with these arguments prints, its exit code, and the exception that escaped or that ended it."""
    runner, code, exception = CliRunner(env=env), 0, None
    with runner.isolation(input=stdin) as (stdout, stderr, output):
        try:
            _command().main(args=[str(argument) for argument in arguments], prog_name="nybble")
        except SystemExit as exit:
            assert exit.code is None or isinstance(exit.code, int)
            code = exit.code or 0
            exception = exit if code else None
        except Exception as error:
            code, exception = 1, error
        sys.stdout.flush()
        sys.stderr.flush()
        printed = stdout.getvalue(), stderr.getvalue(), output.getvalue()
    return Result(runner, *printed, None, code, exception)
