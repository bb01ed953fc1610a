"""Plans: every strategy, the chosen one by component, and what lost by what."""

from rich.table import Table

from nybble.cli.render.terminal import Terminal, show
from nybble.planning.planner import Plan
from nybble.planning.report import Planned, describe_left
from nybble.units import format_bytes


@show.register
def _(event: Planned, terminal: Terminal) -> None:
    """A line for each strategy, then the chosen plan by component, and what is neither in four bits nor trained."""
    plans, machine = event.plans, event.plans.machine
    title = f"{machine.name}, {format_bytes(machine.budget_bytes)} to plan for"
    table = Table(title=title, title_justify="left")
    for name in ("strategy", "rows at once", "blocks keep", "peak", "step"):
        table.add_column(name, justify="left" if name in ("strategy", "blocks keep") else "right")
    for plan in plans.best:
        chosen = plans.chosen is not None and plan.strategy == plans.chosen.strategy
        shown = plans.chosen if chosen and plans.chosen is not None else plan
        strategy = str(shown.strategy)
        if shown.resident_blocks is not None:
            strategy += f" ({shown.resident_blocks} blocks stay{', optimizer paged' if shown.paged else ''})"
        table.add_row(
            strategy,
            str(shown.micro_batch_size),
            shown.keep,
            format_bytes(shown.peak_bytes),
            f"{shown.step_s:.3g} s",
            style="bold" if chosen else None,
        )
    terminal.console.print(table)
    for plan in plans.rejected:
        said = f"{plans.reason(plan).sentence}{f'; it would fit: {plan.way}' if plan.way else ''}"
        terminal.say(f"not {plan.strategy}: {said}", soft_wrap=True)
    if plans.chosen is not None:
        show_components(terminal, plans.chosen)
    for line in describe_left(event.asked):
        terminal.say(line, soft_wrap=True)


def show_components(terminal: Terminal, plan: Plan) -> None:
    """The predicted memory by component."""
    table = Table(title=f"predicted memory: {plan.describe()}", title_justify="left")
    table.add_column("component")
    table.add_column("bytes", justify="right")
    for name, num_bytes in plan.components.items():
        table.add_row(name, format_bytes(num_bytes))
    table.add_row("peak", format_bytes(plan.peak_bytes), style="bold")
    terminal.console.print(table)
