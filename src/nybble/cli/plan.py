"""`nybble plan`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import nybble
from nybble.cli.lazy_terminal import LazyTerminal, plot_errors


def plan(
    given: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Print the plans as one JSON object, for machines.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the strategies as bars against the budget.")
    ] = None,
) -> int:
    """Say what would fit into memory, from the model's config.json alone, and why the rest would not."""
    with LazyTerminal() as listener:
        planned = nybble.plan(on_event=listener, **given)
    from nybble.events import Note
    from nybble.planning.report import MethodsPlanned, Planned
    from nybble.training.plots import draw_plans

    if plot is not None:
        with plot_errors(plot):
            draw_plans(planned.plans, plot)
    if as_json:
        typer.echo(json.dumps(planned.to_json(), indent=2))
    else:
        listener(Planned(planned.plans, planned.asked))
        listener(MethodsPlanned(planned.plans))
        if planned.teacher is not None:
            listener(Note(f"before the run its teacher is asked; {planned.teacher.describe()}"))
    planned.check()
    return 0
