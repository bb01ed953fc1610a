"""`plan.json` of a run: what was chosen and predicted, why the others lost, and what was measured."""

import json
from dataclasses import asdict
from pathlib import Path

from nybble.planning.planner import Plans
from nybble.planning.report import plans_json
from nybble.runs.base import RoundingChoice


def write_plan(
    path: Path, plans: Plans, backbone: str, rounding: RoundingChoice | None, measured: dict[str, float]
) -> None:
    """`plan.json`: what was chosen and predicted, why the others lost, and what was measured."""
    about = {"path": backbone, "rounding": None if rounding is None else asdict(rounding)}
    record = plans_json(plans, **about) | {"measured": measured}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
