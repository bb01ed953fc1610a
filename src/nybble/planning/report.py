"""Plans for people and for machines."""

from dataclasses import dataclass
from typing import Any, ClassVar

from nybble.events import Event
from nybble.planning.costs import end_bytes
from nybble.planning.planner import Plans
from nybble.planning.strategies import PlanRequest, Strategy
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
    return {
        "machine": {"name": plans.machine.name, "budget_bytes": plans.machine.budget_bytes},
        "chosen": chosen,
        "rejected": [plan.to_json(plans.reason(plan)) for plan in plans.rejected],
    }
