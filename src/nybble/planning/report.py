"""Plans for people and for machines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nybble.events import Event
from nybble.planning.base_costs import end_bytes
from nybble.planning.planner import Plan, Plans, best_of_method
from nybble.planning.strategies import METHODS, PlanRequest, Strategy, method_of
from nybble.sources.parts import without_numbers
from nybble.units import format_bytes


@dataclass(frozen=True)
class Planned(Event):
    """What was chosen, what lost, and what was asked."""

    kind: ClassVar[str] = "plan"
    plans: Plans
    asked: PlanRequest

    def fields(self) -> dict[str, Any]:
        return plans_json(self.plans)


STRATEGY_COLUMNS = ("strategy", "rows at once", "blocks keep", "peak", "step")


def strategy_rows(plans: Plans) -> list[tuple[str, ...]]:
    """A row of STRATEGY_COLUMNS for each of `plans.best`."""
    rows: list[tuple[str, ...]] = []
    for plan in plans.best:
        chosen = plans.chosen is not None and plan.strategy == plans.chosen.strategy
        shown = plans.chosen if chosen and plans.chosen is not None else plan
        strategy = str(shown.strategy)
        if shown.resident_blocks is not None:
            strategy += f" ({shown.resident_blocks} blocks stay{', optimizer paged' if shown.paged else ''})"
        peak, step = format_bytes(shown.peak_bytes), f"{shown.step_s:.3g} s"
        rows.append((strategy, str(shown.micro_batch_size), shown.keep, peak, step))
    return rows


METHOD_COLUMNS = ("method", "peak", "step", "is it right here?")


@dataclass(frozen=True)
class MethodsPlanned(Event):
    """What full fine-tuning, LoRA over 16 bits and QLoRA would take here."""

    plans: Plans


def method_rows(plans: Plans) -> list[tuple[str, ...]]:
    """A row of METHOD_COLUMNS for each method, whichever was asked for."""
    rows: list[tuple[str, ...]] = []
    for method in METHODS:
        plan = best_of_method(plans, method)
        chosen = plans.chosen is not None and method_of(plans.chosen.strategy) == method
        shown = plans.chosen if chosen and plans.chosen is not None else plan
        said = "planned" if chosen else f"fits: --method {method}"
        if shown.too_large is not None:
            said = shown.too_large.sentence
        elif not shown.left_to_method:
            said = plans.reason(shown).sentence
        rows.append((method, format_bytes(shown.peak_bytes), f"{shown.step_s:.3g} s", said))
    return rows


def methods_json(plans: Plans) -> list[dict[str, Any]]:
    """The same for machines: bytes, seconds, and whether it fits."""
    found = {method: best_of_method(plans, method) for method in METHODS}
    return [
        {"method": method, "strategy": plan.strategy, "peak_bytes": plan.peak_bytes, "step_s": round(plan.step_s, 4)}
        | {"fits": plan.too_large is None and plan.left_to_method}
        for method, plan in found.items()
    ]


def component_rows(plan: Plan) -> list[tuple[str, str]]:
    """The predicted memory by component, and the peak."""
    parts = (*plan.components.items(), ("peak", plan.peak_bytes))
    return [(str(name), format_bytes(num_bytes)) for name, num_bytes in parts]


def describe_rejected(plans: Plans) -> list[str]:
    """What lost, and by what."""
    lines = []
    for plan in plans.rejected:
        said = f"{plans.reason(plan).sentence}{f'; it would fit: {plan.way}' if plan.way else ''}"
        lines.append(f"not {plan.strategy}: {said}")
    return lines


def describe_machine(plans: Plans) -> str:
    machine = plans.machine
    note = f"; {machine.note}" if machine.note else ""
    return f"{machine.name}, {format_bytes(machine.budget_bytes)} to plan for{note}"


def describe_plans(plans: Plans, request: PlanRequest) -> str:
    """All of it as plain text: a line for each strategy, the chosen plan by component, what is left out."""
    lines = [describe_machine(plans), *_aligned([STRATEGY_COLUMNS, *strategy_rows(plans)], left=(0, 2))]
    lines += describe_rejected(plans)
    if plans.chosen is not None:
        lines += [f"predicted memory: {plans.chosen.describe()}", *_aligned(component_rows(plans.chosen), left=(0,))]
    lines += describe_left(request)
    return "\n".join(lines + _aligned([METHOD_COLUMNS, *method_rows(plans)], left=(0, 3)))


def _aligned(rows: Sequence[tuple[str, ...]], left: tuple[int, ...]) -> list[str]:
    """Columns as wide as their widest cell, those in `left` flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = (
        [cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    )
    return ["  ".join(row).rstrip() for row in cells]


def describe_left(request: PlanRequest) -> list[str]:
    """What stays as wide as it is computed with, and what gets no adapter, each with its bytes in the run."""
    run, parts = request.run, request.run.model.parts
    spec = run.spec if Strategy.LORA_16 in request.excluded else None
    adapted = {without_numbers(name) for name in request.adapted}
    dense = [(name, run.compute_bytes * numel) for name, numel in (*parts.dense, *parts.around)]
    fixed = [(name, size) for name, size in dense if name.removesuffix(".weight") not in adapted]
    others = [(name, numel) for name, numel in parts.linears if name not in adapted]
    left = [(name, run.compute_bytes * numel if spec is None else spec.bytes(numel)) for name, numel in others]
    said = {
        "without an adapter, not in four bits": [
            ("embedding and head", end_bytes(run.model, run.compute_bytes)),
            *fixed,
        ],
        "with an adapter, not in four bits": [part for part in dense if part not in fixed],
        "without an adapter": left,
    }
    lines = []
    if parts.stack_elements:
        active, stored = parts.active_elements / 1e9, parts.elements / 1e9
        lines.append(
            f"a mixture of experts: {stored:.3g} B parameters are stored, {active:.3g} B of them a token meets"
        )
    for what, found in said.items():
        if found:
            listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in found if size)
            lines.append(f"{what}: {listed}")
    return lines


def plans_json(plans: Plans, **about: Any) -> dict[str, Any]:
    """Machine, choice with what else there is to say `about` it, and each strategy that lost with its reason."""
    chosen = None if plans.chosen is None else plans.chosen.to_json()
    if chosen is not None:
        chosen = about | chosen
    machine = {"name": plans.machine.name, "budget_bytes": plans.machine.budget_bytes}
    return {
        "machine": machine | ({"note": plans.machine.note} if plans.machine.note else {}),
        "chosen": chosen,
        "rejected": [plan.to_json(plans.reason(plan)) for plan in plans.rejected],
    }
