"""`nybble.plan`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nybble.api.keywords import as_options
from nybble.events import Listener, silent
from nybble.network import fetching
from nybble.options.option import build_options
from nybble.options.verbs import PlanConfig

if TYPE_CHECKING:
    from nybble.planning.asked import Asking
    from nybble.planning.planner import Plan, Plans
    from nybble.planning.strategies import PlanRequest


@dataclass(frozen=True)
class PlanResult:
    """How a run would fit into memory, and what else was tried; `print` shows it as a table.

    Args:
        plans: every candidate.
        asked: what was planned.
        unconstrained: the same with every choice left to the planner.
        teacher: what asking it takes before the run; None where there is none.
    """

    plans: "Plans"
    asked: "PlanRequest"
    unconstrained: "PlanRequest"
    teacher: "Asking | None" = None

    @property
    def chosen(self) -> "Plan | None":
        """The fastest plan that fits; None where none does. Bytes at the peak, seconds of a step."""
        return self.plans.chosen

    @property
    def rejected(self) -> tuple["Plan", ...]:
        """The best plan of every other strategy; `plans.reason(plan)` says what speaks against it."""
        return self.plans.rejected

    def check(self) -> None:
        """Refuse a run that does not fit.

        Raises:
            PlanError: nothing fits; the message says what would.
        """
        from nybble.planning.planner import require

        if self.teacher is not None:
            self.teacher.check()
        require(self.plans, self.asked, self.unconstrained)

    def to_json(self) -> dict[str, Any]:
        """Machine, choice, each strategy that lost with its reason, and the methods; bytes and seconds."""
        from nybble.planning.report import methods_json, plans_json

        teacher = {} if self.teacher is None else {"teacher": self.teacher.to_json()}
        return plans_json(self.plans) | {"methods": methods_json(self.plans)} | teacher

    def __str__(self) -> str:
        from nybble.planning.report import describe_plans

        teacher = [] if self.teacher is None else [f"before the run its teacher is asked; {self.teacher.describe()}"]
        return "\n".join([describe_plans(self.plans, self.asked), *teacher])


def plan(*, on_event: Listener = silent, **options: Any) -> PlanResult:
    """What would fit into memory, from the model's config.json alone, and why the rest would not.

    Args:
        on_event: told where a model is fetched. A model of a published shape, such as "llama-3-8b", needs no network.
        options: the flags of `nybble plan` with underscores. `model` is needed.

    Returns:
        The plans. One that fits is `chosen`; where none does, `check()` raises what would.

    Raises:
        NybbleError: an option is wrong, or the model's config cannot be found or understood.

    Example:
        >>> planned = nybble.plan(model="llama-3-8b", machine="rtx-4090", host_memory="16GB")
        >>> planned.chosen.peak_bytes < 24e9
        True
        >>> print(planned)                      # doctest: +ELLIPSIS
        rtx-4090, ... to plan for; predicted; never run on such a card
        strategy ...
    """
    config = build_options(PlanConfig, as_options(options))
    from nybble.planning.from_config import plan_from_config

    with fetching(not config.model.offline):
        return PlanResult(*plan_from_config(config, on_event))
