"""`loss.png`: training and held-out loss over the steps of a run."""

from pathlib import Path
from typing import BinaryIO

from nybble.training.events import read_events

_SMOOTHING = 0.9  # of the running mean drawn over the noisy per-step loss


def draw_loss(events: Path, out: Path | BinaryIO) -> None:
    """Draw the losses recorded in `events` (nats per supervised token) into the picture `out`."""
    from matplotlib.figure import Figure  # here, since importing it takes half a second

    steps = list(read_events(events, "step"))
    evaluations = list(read_events(events, "eval"))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if steps:
        x = [record["step"] for record in steps]
        losses = [record["loss"] for record in steps]
        axes.plot(x, losses, color="tab:blue", alpha=0.25, linewidth=1)
        axes.plot(x, _running_mean(losses), color="tab:blue", label="training (running mean)")
    if evaluations:
        x = [record["step"] for record in evaluations]
        axes.plot(x, [record["loss"] for record in evaluations], "o-", color="tab:orange", label="held-out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per supervised token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=120, format="png")


def _running_mean(values: list[float]) -> list[float]:
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total = _SMOOTHING * total + value
        weight = _SMOOTHING * weight + 1
        means.append(total / weight)
    return means
