"""Pictures: training and held-out loss over the steps of a run; what strategies take against a budget."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from nybble.pictures import picture
from nybble.planning.planner import Plans
from nybble.runs.events import read_events

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# metrics that are drawn beside the loss, the first that there is
SECOND = ("rewards/margins", "accuracy", "spearman", "kl")
_SMOOTHING = 0.9  # of the running mean drawn over the noisy per-step loss


def draw_loss(events: Path, out: Path | BinaryIO) -> None:
    """Draw the losses recorded in `events` into the picture `out`; of preferences the margins too, of classes and of
    texts that are compared how often the right one is chosen, of pairs with scores the correlation, of a distilled
    student the KL to its teacher.
    """
    steps = list(read_events(events, "step"))
    evaluations = list(read_events(events, "eval"))
    second = next((name for name in SECOND if steps and name in steps[-1]), None)
    with picture(out, "step", "loss, nats per supervised token" if second is None else "loss") as axes:
        if second is not None:
            _draw_second(axes.twinx(), second, steps, evaluations)
        if steps:
            x = [record["step"] for record in steps]
            losses = [record["loss"] for record in steps]
            axes.plot(x, losses, color="tab:blue", alpha=0.25, linewidth=1)
            axes.plot(x, _running_mean(losses), color="tab:blue", label="training (running mean)")
        if evaluations:
            x = [record["step"] for record in evaluations]
            axes.plot(x, [record["loss"] for record in evaluations], "o-", color="tab:orange", label="held-out")
        axes.grid(alpha=0.3)
        if steps or evaluations:
            axes.legend()


def draw_rates(losses: Mapping[float, float | None], suggested: float, out: Path) -> None:
    """Draw the held-out loss that each learning rate led to; rates without a finite one are marked at the top."""
    finite = {rate: loss for rate, loss in losses.items() if loss is not None}
    with picture(out, "learning rate", "held-out loss after a small run") as axes:
        axes.plot(list(finite), list(finite.values()), "o-", color="tab:blue")
        axes.axvline(suggested, color="grey", linestyle=":", label="suggested by the model's width")
        if finite:
            best = min(finite, key=finite.__getitem__)
            axes.plot([best], [finite[best]], "o", color="tab:orange", markersize=10, label=f"lowest: {best:g}")
        failed = [rate for rate in losses if rate not in finite]
        if failed:
            top = axes.get_ylim()[1]
            axes.plot(failed, [top] * len(failed), "x", color="tab:red", label="not finite", clip_on=False)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(losses), [f"{rate:g}" for rate in losses])
        axes.grid(alpha=0.3)
        axes.legend()


def _draw_second(axes: "Axes", metric: str, steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> None:
    """On axes of their own, which share the steps."""
    means = _running_mean([record[metric] for record in steps])
    axes.plot([record["step"] for record in steps], means, ":", color="tab:green", linewidth=1)
    held_out = [record[metric] for record in evaluations]
    axes.plot([record["step"] for record in evaluations], held_out, "x:", color="tab:green")
    axes.set_ylabel(f"{metric} (dotted)", color="tab:green", labelpad=-28)


def draw_plans(plans: Plans, out: Path) -> None:
    """Draw the best plan of each strategy as a stacked bar of its components, and the budget as a line."""
    names = list(dict.fromkeys(name for plan in plans.best for name in plan.components))
    labels = [plan.strategy for plan in plans.best]
    left = [0.0] * len(labels)
    with picture(out, "GB at the highest moment", inches=(9, 4.5), fitted=True) as axes:
        for i, name in enumerate(names):
            sizes = [plan.components.get(name, 0) / 1e9 for plan in plans.best]
            axes.barh(labels, sizes, left=left, label=name, color=f"C{i % 10}", hatch="//" if i >= 10 else None)
            left = [start + size for start, size in zip(left, sizes, strict=True)]
        axes.axvline(plans.machine.budget_bytes / 1e9, color="black", linestyle="--", label="budget")
        axes.invert_yaxis()
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _running_mean(values: list[float]) -> list[float]:
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total = _SMOOTHING * total + value
        weight = _SMOOTHING * weight + 1
        means.append(total / weight)
    return means
