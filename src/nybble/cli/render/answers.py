"""What models are worth: a run against its base, ways of quantising against the 16-bit model; and who serves them."""

import math

from nybble.cli.render.terminal import Terminal, new_table, show
from nybble.evaluation.by_objective import ByObjective
from nybble.evaluation.classes import ScoresEvaluated
from nybble.evaluation.compare_arms import ArmsCompared
from nybble.evaluation.compare_methods import PLOT, MethodsCompared
from nybble.evaluation.embeddings import TextsCompared
from nybble.evaluation.evaluate import TUNED, Evaluated
from nybble.evaluation.rewards import RewardsEvaluated
from nybble.evaluation.scores import Estimate
from nybble.serving.server import ServerReady
from nybble.units import format_bytes


@show.register
def _(event: Evaluated, terminal: Terminal) -> None:
    """Losses with their intervals, what was forgotten, and how answers match."""
    evaluation = event.evaluation
    title = f"{len(evaluation.rows)} held-out rows, {int(evaluation.tokens.sum())} supervised tokens"
    figures = ["loss", "perplexity", "tuned minus this", "KL, general text", *evaluation.metrics]
    table = new_table(title, ["model", *figures], right=figures)
    table.caption = "in brackets: 95 % of 2000 draws of the rows"
    for name, arm in evaluation.arms.items():
        loss = evaluation.loss(name)
        change = "" if name == TUNED else _interval(evaluation.change(name), "+.4f")
        scores = [_interval(evaluation.score(name, metric), ".3f") for metric in evaluation.metrics if arm.answers]
        cells = [name, _interval(loss, ".4f"), f"{math.exp(loss.value):.3f}", change]
        cells.append("" if arm.kl_general is None else f"{arm.kl_general:.4f}")
        table.add_row(*cells, *scores)
    terminal.console.print(table)
    if evaluation.by_objective is not None:
        _show_by_objective(evaluation.by_objective, terminal)
    for task, result in evaluation.lm_eval.items():
        terminal.say(f"{task}: {result}")


@show.register
def _(event: ScoresEvaluated, terminal: Terminal) -> None:
    """Figures, and each class by itself."""
    for name, value in event.judged.figures().items():
        terminal.say(f"{name}: {value}")
    if not (classes := event.judged.classes()):
        return
    unit = event.judged.unit
    figures = (unit, "precision", "recall", "F1")
    table = new_table(f"{event.judged.texts} held-out rows", ["class", *figures], right=figures)
    for each in classes:
        rates = (f"{each[name]:.3f}" for name in ("precision", "recall", "f1"))
        table.add_row(each["label"], str(each[unit]), *rates)
    terminal.console.print(table)


@show.register
def _(event: RewardsEvaluated, terminal: Terminal) -> None:
    for name, value in event.judged.figures().items():
        terminal.say(f"{name}: {value}")


@show.register
def _(event: TextsCompared, terminal: Terminal) -> None:
    """Base and tuned model beside each other."""
    table = new_table(f"{len(event.tuned.cosines)} held-out rows", ["", "base", "tuned"], right=("base", "tuned"))
    for name, (base, tuned) in event.figures().items():
        table.add_row(name, _interval(base, ".4f"), _interval(tuned, ".4f"))
    terminal.console.print(table)


def _show_by_objective(found: ByObjective, terminal: Terminal) -> None:
    title = (
        f"{found.rows} held-out rows by {found.objective}; KL from the base {_interval(found.kl, '.4f')} nats a token"
    )
    table = new_table(title, ["", "base", "tuned"], right=("base", "tuned"))
    table.add_row("loss", f"{found.base.loss:.4f}", f"{found.tuned.loss:.4f}")
    for name, tuned in found.tuned.metrics.items():
        table.add_row(name, f"{found.base.metrics[name]:.4f}", f"{tuned:.4f}")
    terminal.console.print(table)


def _interval(estimate: Estimate, form: str) -> str:
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


@show.register
def _(event: ArmsCompared, terminal: Terminal) -> None:
    figures = ("KL mean", "median", "p99", "loss difference (95 %)", "same top 1", "bits/weight", "seconds")
    table = new_table("against the 16-bit model, in nats a token", ["arm", *figures], right=figures)
    for result in event.results:
        q = result.quality
        table.add_row(
            result.arm,
            f"{q.kl_mean:.4f}",
            f"{q.kl_median:.4f}",
            f"{q.kl_p99:.3f}",
            f"{q.loss_difference:+.4f} ({q.difference_low:+.4f} to {q.difference_high:+.4f})",
            f"{q.top1_agreement:.1%}",
            f"{result.bits_per_weight:.3f}",
            f"{result.seconds:.1f}",
        )
    terminal.console.print(table)


@show.register
def _(event: ServerReady, terminal: Terminal) -> None:
    terminal.say(f"models: {', '.join(event.models)}")
    terminal.say(f"listening on {event.url}")


@show.register
def _(event: MethodsCompared, terminal: Terminal) -> None:
    """A line for each method, and what was left out."""
    figures = ("peak", "planned", "tokens/s", "loss before", "after", "retention", "it leaves", "lr")
    table = new_table("methods, compared", ["method", *figures], right=figures)
    for found in event.results:
        retention = "" if found.retention is None else f"{found.retention:.0%}"
        sizes = [format_bytes(size) for size in (found.peak_bytes, found.planned_bytes)]
        losses = [f"{loss:.4f}" for loss in (found.loss_before, found.loss_after)]
        leaves, lr = format_bytes(found.artefact_bytes), f"{found.lr:g}"
        table.add_row(found.method, *sizes, f"{found.tokens_per_s:.0f}", *losses, retention, leaves, lr)
    terminal.console.print(table)
    for left in event.left_out:
        planned = "" if left.planned_bytes is None else f" ({format_bytes(left.planned_bytes)} planned)"
        terminal.say(f"left out: {left.method}{planned}: {left.reason}")
    for note in event.notes:
        terminal.say(note)
    terminal.say(f"{event.folder / PLOT}")
