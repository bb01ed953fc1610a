"""`nybble compare`."""

import json
from typing import Annotated, Any

import typer

import nybble
from nybble.cli.lazy_terminal import LazyTerminal
from nybble.cli.train import SIGNAL_EXIT_CODE
from nybble.events import silent


def compare(
    given: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as one JSON object.")] = False,
) -> int:
    """Compare full fine-tuning, LoRA over 16 bits and QLoRA on your model and examples: memory, speed, loss, size."""
    with LazyTerminal() as listener:
        compared = nybble.compare(on_event=silent if as_json else listener, **given)
    if as_json:
        typer.echo(json.dumps(compared.to_json(), indent=2))
    if compared.interrupted:
        typer.echo("Interrupted; what is finished stays, and the same command goes on.", err=True)
        return SIGNAL_EXIT_CODE + compared.interrupted
    return 0
