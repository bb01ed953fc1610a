"""Plans in words and tables, before a run and beside what was measured."""

from typing import Any

from rich.console import Console
from rich.table import Table

from nybble.memory.measure import PeakMemory
from nybble.planning import planner
from nybble.planning.costs import end_bytes
from nybble.planning.planner import Ask, Plan, Plans
from nybble.sources.inventory import without_numbers
from nybble.units import format_bytes


def show_plans(console: Console, plans: Plans, ask: Ask) -> None:
    """A line for each strategy, then the chosen plan by component, and what is neither in four bits nor trained."""
    machine = plans.machine
    title = f"{machine.name}, {format_bytes(machine.budget_bytes)} to plan for"
    table = Table(title=title, title_justify="left")
    for name in ("strategy", "rows at once", "blocks keep", "peak", "step"):
        table.add_column(name, justify="left" if name in ("strategy", "blocks keep") else "right")
    for plan in plans.best:
        chosen = plans.chosen is not None and plan.strategy == plans.chosen.strategy
        shown = plans.chosen if chosen and plans.chosen is not None else plan
        strategy = shown.strategy
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
    console.print(table)
    for plan in plans.rejected:
        said = f"{plans.reason(plan).sentence}{f'; it would fit: {plan.way}' if plan.way else ''}"
        console.print(f"not {plan.strategy}: {said}", highlight=False, markup=False, soft_wrap=True)
    if plans.chosen is not None:
        show_components(console, plans.chosen)
    for line in describe_left(ask):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def describe_left(ask: Ask) -> list[str]:
    """What stays as wide as it is computed with, and what gets no adapter, each with its bytes in the run."""
    parts, spec = ask.shape.parts, None if planner.LORA16 not in ask.barred else ask.spec
    adapted = {without_numbers(name) for name in ask.adapted}
    dense = [(name, ask.compute_bytes * numel) for name, numel in (*parts.dense, *parts.around)]
    fixed = [(name, size) for name, size in dense if name.removesuffix(".weight") not in adapted]
    others = [(name, numel) for name, numel in parts.linears if name not in adapted]
    left = [(name, ask.compute_bytes * numel if spec is None else spec.bytes(numel)) for name, numel in others]
    said = {
        "without an adapter, not in four bits": [
            ("embedding and head", end_bytes(ask.shape, ask.compute_bytes)),
            *fixed,
        ],
        "with an adapter, not in four bits": [part for part in dense if part not in fixed],
        "without an adapter": left,
    }
    lines = []
    for what, found in said.items():
        if found:
            listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in found if size)
            lines.append(f"{what}: {listed}")
    return lines


def show_components(console: Console, plan: Plan) -> None:
    """The predicted memory by component."""
    table = Table(title=f"predicted memory: {plan.describe()}", title_justify="left")
    table.add_column("component")
    table.add_column("bytes", justify="right")
    for name, num_bytes in plan.components.items():
        table.add_row(name, format_bytes(num_bytes))
    table.add_row("peak", format_bytes(plan.peak_bytes), style="bold")
    console.print(table)


def show_measured(console: Console, plan: Plan, memory: PeakMemory, step_s: float) -> None:
    """Predicted against measured peak and step time."""
    console.print(
        f"peak memory: {format_bytes(memory.peak_bytes)} measured, {format_bytes(plan.peak_bytes)} predicted; "
        f"a step: {step_s:.3g} s measured, at most {plan.step_s:.3g} s predicted",
        highlight=False,
    )


def plans_json(plans: Plans, **about: Any) -> dict[str, Any]:
    """Machine, choice with what else there is to say `about` it, and each strategy that lost with its reason."""
    chosen = None if plans.chosen is None else plans.chosen.to_json()
    if chosen is not None:
        chosen = about | chosen
    return {
        "machine": {"name": plans.machine.name, "budget_bytes": plans.machine.budget_bytes},
        "chosen": chosen,
        "rejected": [plan.to_json(plans.reason(plan)) for plan in plans.rejected],
    }
