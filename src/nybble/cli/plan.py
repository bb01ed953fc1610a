"""`nybble plan`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from nybble.options.option import build_options
from nybble.options.verbs import PlanConfig


def plan(
    given: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Print the plans as one JSON object, for machines.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the strategies as bars against the budget.")
    ] = None,
) -> int:
    """Say what would fit into memory, from the model's config.json alone, and why the rest would not."""
    config = build_options(PlanConfig, given)
    from nybble.cli.render import Terminal
    from nybble.planning.from_config import plan_from_config
    from nybble.planning.report import Planned, plans_json
    from nybble.training.plots import draw_plans

    terminal = Terminal()
    plans, asked, unconstrained = plan_from_config(config, terminal)
    if plot is not None:
        draw_plans(plans, plot)
    if as_json:
        typer.echo(json.dumps(plans_json(plans), indent=2))
    else:
        terminal(Planned(plans, asked))
    from nybble.planning.planner import require

    require(plans, asked, unconstrained)
    return 0
