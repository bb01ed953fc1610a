"""`nybble push`."""

from pathlib import Path
from typing import Annotated, Any

import typer

import nybble
from nybble.cli.lazy_terminal import LazyTerminal


def push(
    given: dict[str, Any],
    folder: Annotated[
        Path, typer.Argument(metavar="RUN_OR_FOLDER", help="Run, or a folder that `nybble merge` or `export` wrote.")
    ],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository of the hub; made where needed.")],
) -> int:
    """Put an adapter, a merged model or a GGUF file onto the Hugging Face hub, with its card."""
    with LazyTerminal() as listener:
        nybble.push(folder, repository, on_event=listener, **given)
    return 0
