"""Plans: every strategy, the chosen one by component, and what lost by what."""

from nybble.cli.render.terminal import Terminal, new_table, show
from nybble.planning import report
from nybble.planning.planner import Plan


@show.register
def _(event: report.Planned, terminal: Terminal) -> None:
    """A line for each strategy, then the chosen plan by component, and what is neither in four bits nor trained."""
    plans, chosen = event.plans, event.plans.chosen
    columns = report.STRATEGY_COLUMNS
    table = new_table(report.describe_machine(plans), columns, right={*columns} - {"strategy", "blocks keep"})
    for plan, row in zip(plans.best, report.strategy_rows(plans), strict=True):
        table.add_row(*row, style="bold" if chosen is not None and plan.strategy == chosen.strategy else None)
    terminal.console.print(table)
    for line in report.describe_rejected(plans):
        terminal.say(line, soft_wrap=True)
    if chosen is not None:
        show_components(terminal, chosen)
    for line in report.describe_left(event.asked):
        terminal.say(line, soft_wrap=True)


@show.register
def _(event: report.MethodsPlanned, terminal: Terminal) -> None:
    """A line for each method."""
    table = new_table("methods", report.METHOD_COLUMNS, right=("peak", "step"))
    for row in report.method_rows(event.plans):
        table.add_row(*row)
    terminal.console.print(table)


def show_components(terminal: Terminal, plan: Plan) -> None:
    """The predicted memory by component."""
    table = new_table(f"predicted memory: {plan.describe()}", ("component", "bytes"), right=("bytes",))
    *parts, peak = report.component_rows(plan)
    for row in parts:
        table.add_row(*row)
    table.add_row(*peak, style="bold")
    terminal.console.print(table)
