"""`nybble train`."""

from pathlib import Path
from typing import Annotated, Any

import typer

import nybble
from nybble.cli.lazy_terminal import LazyTerminal
from nybble.options.verbs import draft_config

NUM_SAMPLES = 3
SIGNAL_EXIT_CODE = 128  # plus the signal's number, as shells count it


def train(
    given: dict[str, Any],
    config_file: Annotated[
        Path | None, typer.Argument(metavar="FILE.yaml", help="Options, named as the flags are; flags win over it.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all options with comments as YAML, and stop.")
    ] = False,
) -> int:
    """Fine-tune a model on examples: adapters over frozen weights of four bits or of 16, or every weight."""
    if print_config:
        typer.echo(draft_config(config_file, given), nl=False)
        return 0
    with LazyTerminal() as listener:
        trained = nybble.train(config_file, on_event=listener, **given)
    from nybble.cli.render import training
    from nybble.evaluation.samples import compare_answers

    if trained.interrupted:
        training.show_interrupted(listener.terminal, trained)
        return SIGNAL_EXIT_CODE + trained.interrupted
    # Where the base is streamed, an answer would read all of it for every token.
    rows = [] if trained.streamed or not trained.writes_answers else trained.validation[:NUM_SAMPLES]
    samples = compare_answers(trained.model, trained.template, rows, switch=trained.switch) if rows else []
    training.show_result(listener.terminal, trained, samples)
    return 0
