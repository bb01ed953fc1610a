"""Plans: every strategy, the chosen one by component, and what lost by what."""

from rich.table import Table

from nybble.cli.render.terminal import Terminal, show
from nybble.planning.planner import Plan
from nybble.planning.report import (
    STRATEGY_COLUMNS,
    Planned,
    component_rows,
    describe_left,
    describe_machine,
    describe_rejected,
    strategy_rows,
)


@show.register
def _(event: Planned, terminal: Terminal) -> None:
    """A line for each strategy, then the chosen plan by component, and what is neither in four bits nor trained."""
    plans, chosen = event.plans, event.plans.chosen
    table = Table(title=describe_machine(plans), title_justify="left")
    for name in STRATEGY_COLUMNS:
        table.add_column(name, justify="left" if name in ("strategy", "blocks keep") else "right")
    for plan, row in zip(plans.best, strategy_rows(plans), strict=True):
        table.add_row(*row, style="bold" if chosen is not None and plan.strategy == chosen.strategy else None)
    terminal.console.print(table)
    for line in describe_rejected(plans):
        terminal.say(line, soft_wrap=True)
    if chosen is not None:
        show_components(terminal, chosen)
    for line in describe_left(event.asked):
        terminal.say(line, soft_wrap=True)


def show_components(terminal: Terminal, plan: Plan) -> None:
    """The predicted memory by component."""
    table = Table(title=f"predicted memory: {plan.describe()}", title_justify="left")
    table.add_column("component")
    table.add_column("bytes", justify="right")
    *parts, peak = component_rows(plan)
    for row in parts:
        table.add_row(*row)
    table.add_row(*peak, style="bold")
    terminal.console.print(table)
