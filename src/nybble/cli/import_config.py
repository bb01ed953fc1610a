"""`nybble import`."""

from pathlib import Path
from typing import Annotated, Any

import typer

import nybble
from nybble.errors import ConfigError
from nybble.files.disk import disk_errors, write_complete


def import_config(
    given: dict[str, Any],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML or JSON of Axolotl, LLaMA-Factory, Unsloth, TRL.")],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FILE.yaml", help="Write a file instead of printing.")
    ] = None,
) -> int:
    """Rewrite another tool's training config as nybble's; every key without counterpart is named."""
    imported = nybble.import_config(file)
    if to is None:
        typer.echo(imported.text, nl=False)
    elif to.exists():
        raise ConfigError(f"{to} is there already.", "Allowed: a new file.", "Name another, or remove it.")
    else:
        with disk_errors(to, ConfigError, "Needed: a folder that can be written.", "Name another file."):
            write_complete(to, imported.text)
    counted = f"{len(imported.options)} options, {len(imported.left_out)} keys without counterpart"
    typer.echo(": ".join([counted, ", ".join(imported.left_out)]) if imported.left_out else counted, err=True)
    return 0
