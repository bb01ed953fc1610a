"""Command lines in processes of their own, of which each begins with everything imported.

Importing torch and transformers takes some five seconds, which `python -m nybble` would pay each time. A server, one
for each process of pytest, imports them once and forks what a test starts. It runs nothing itself, so that no thread
is lost in a fork. What an import itself does is tested with `subprocess`, not here.
"""

import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [  # nybble first: it says how threads wait, before torch is loaded
        *("nybble.cli.main", "nybble.training.session", "transformers.models.llama.modeling_llama"),
        *("matplotlib.backends.backend_agg", "matplotlib.figure"),
    ]
)


class Process:
    """A fork that does `work(*arguments)`, in the folder and the environment of the test that starts it.

    Args:
        work: a function of a module that is on the path.
        output: what is printed goes into this file.
    """

    def __init__(self, work: Callable[..., object], *arguments: object, output: Path):
        self.output = output
        output.touch()
        given = work, arguments, output, Path.cwd(), dict(os.environ)
        self._process = _FORKS.Process(target=_do, args=given)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        return self._process.exitcode

    @property
    def printed(self) -> str:
        return self.output.read_text()

    def end(self, timeout: float = 120) -> tuple[int, str]:
        """Wait for its end; returns the exit code and what it printed."""
        self._process.join(timeout)
        assert self.exit_code is not None, f"runs for more than {timeout} s: {self.printed}"
        return self.exit_code, self.printed

    def wait_for(self, file: Path, text: str, timeout: float = 120) -> None:
        """Wait until `text` stands in `file`, which need not be there yet."""
        deadline = time.monotonic() + timeout
        while not file.exists() or text not in file.read_text():
            assert time.monotonic() < deadline and self.exit_code is None, self.printed
            time.sleep(0.01)


def nybble(*arguments: object, output: Path) -> Process:
    """`nybble` with arguments as they are typed."""
    return Process(_command_line, *map(str, arguments), output=output)


def program(path: Path, *arguments: object, output: Path) -> Process:
    """The program in the file `path`, as `python` runs it."""
    return Process(_program, str(path), *map(str, arguments), output=output)


def _program(*arguments: str) -> None:
    sys.argv = list(arguments)
    runpy.run_path(arguments[0], run_name="__main__")


def _command_line(*arguments: str) -> None:
    from nybble.cli.main import app

    app(arguments, prog_name="nybble")


def _do(
    work: Callable[..., object],
    arguments: Sequence[object],
    output: Path,
    folder: Path,
    environment: Mapping[str, str],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    printed = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    work(*arguments)
