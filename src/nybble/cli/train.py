"""`nybble train`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nybble.config import draft_config, load_config


def train(
    given: dict[str, Any],
    config_file: Annotated[
        Path | None, typer.Argument(metavar="FILE.yaml", help="Options, named as the flags are; flags win over it.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all options with comments as YAML, and stop.")
    ] = False,
) -> int:
    """Fine-tune a model on examples: four-bit frozen weights, trained adapters."""
    if print_config:
        typer.echo(draft_config(config_file, given), nl=False)
        return 0
    config = load_config(config_file, given)
    from nybble.evaluation.report import show_result
    from nybble.training.session import train as run_training

    console = Console()
    return show_result(run_training(config, console), console)
