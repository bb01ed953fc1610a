"""--lr auto: the learning rate that a model's width suggests, and a short sweep around it.

Each candidate is a small run of its own: from the adapters that training begins with, over the rows of its first steps,
with its schedule squeezed into them, measured by its loss on held-out rows. The best rate of a short run is too high
for a long one, and grows with the number of steps to the power of -0.32 (Bjorck et al. 2024, arXiv 2409.19913, LR*(D) =
B D^-0.32): so a candidate's small run takes as much more. Afterwards everything is as it was, so that the run is the
one that this rate would have given.
"""

import math
import signal
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nybble.data.encoded_rows import lengths_of
from nybble.data.examples import EncodedExample
from nybble.data.sampler import StepSampler
from nybble.errors import TrainingError
from nybble.events import Listener, silent, tracked
from nybble.files.disk import TEMPORARY
from nybble.layers.batch_model import BatchModel
from nybble.options.adapter_groups import NewAdapters
from nybble.options.groups import LoopOptions
from nybble.options.objective_groups import PREFERENCES
from nybble.runs.folder import RunFolder
from nybble.runs.trained import Trained
from nybble.training.checkpoint import Checkpoints
from nybble.training.evaluations import Evaluations
from nybble.training.events import RateChosen, RateTried
from nybble.training.interrupt import InterruptOnce
from nybble.training.loop import LoopResult, Measured, validation_loss
from nybble.training.plots import draw_rates
from nybble.training.rng import capture_rng, restore_rng
from nybble.training.schedule import warmup_steps
from nybble.training.start import Examples, Opened

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LORA_LR, WIDTH, ALPHA = 5e-4, 2000, 32  # of LoRA at this width and alpha
LORA_FACTOR = 10  # times the best rate of full fine-tuning
EXPONENTS = {"qwen": 0.0775}  # of families whose rate falls less with the width
EXPONENT = 0.781  # of Llama, and of what nothing is known of
PREFERENCE_FACTOR = 1 / 30  # preferences are learnt with 5e-6 to 5e-5 where examples are with 5e-4
HORIZON = 0.32  # the power of the steps that the best rate falls with
SHARE = 0.1  # of the run's steps that a sweep may take; its evaluations take as many rows, but no backward pass
AROUND = (0.25, 0.5, 1.0, 2.0, 4.0)  # times what is suggested
LEAST_STEPS = 8  # of a candidate, from which on its loss says something


def suggested_lr(
    config: "PretrainedConfig", adapters: NewAdapters, preferences: bool, every_weight: bool = False
) -> float:
    """The rate that LoRA is likely to learn well with: 5e-4 · (2000 / h)^e · 32 / alpha, for hidden size h.

    Rule and constants are of "LoRA Without Regret" (Schulman et al. 2025) and the formula its authors published with
    it: ten times the best rate of full fine-tuning, whatever the rank, where the product is scaled by 32 / rank; e is
    0.781 for Llama, 0.0775 for Qwen. AdamW's first steps change B·A by the rate times the scaling, so that another
    alpha (or rsLoRA, which is one) takes another rate.

    Args:
        preferences: are what is learnt.
        every_weight: is trained, and no adapter: then it is a tenth, whatever alpha is.
    """
    text = config.get_text_config()
    exponent = next((e for name, e in EXPONENTS.items() if text.model_type.startswith(name)), EXPONENT)
    rate = LORA_LR * (WIDTH / text.hidden_size) ** exponent * (PREFERENCE_FACTOR if preferences else 1.0)
    if every_weight:
        return _rounded(rate / LORA_FACTOR)
    alpha = adapters.alpha * (adapters.settled_rank**0.5 if adapters.rslora else 1.0)
    return _rounded(rate * ALPHA / alpha)


@dataclass(frozen=True)
class SweepPlan:
    """What is tried.

    Args:
        rates: from the lowest to the highest; one where nothing is tried.
        steps: of each.
        factor: of a rate in so few steps instead of all.
        rows: that each is measured on.
        why_none: why nothing is tried, else "".
    """

    rates: tuple[float, ...]
    steps: int = 0
    factor: float = 1.0
    rows: Sequence[EncodedExample] = ()
    why_none: str = ""


def plan_sweep(
    suggested: float,
    train: Sequence[EncodedExample],
    held_out: Sequence[EncodedExample],
    sampler: StepSampler,
    total_steps: int,
) -> SweepPlan:
    """Five candidates or three, in a tenth of the run's steps together; none where that is too few for each.

    Args:
        sampler: a fresh one of the run's. Where no row is held out, rows are held back that its next steps draw.
    """
    for factors in (AROUND, AROUND[1:-1]):
        steps = int(SHARE * total_steps / len(factors))
        if steps >= LEAST_STEPS:
            break
    else:
        least = round(LEAST_STEPS * len(AROUND[1:-1]) / SHARE)
        return SweepPlan((suggested,), why_none=f"a sweep takes a tenth of a run of {least} steps at least")
    drawn = [row for _ in range(steps) for row in sampler.next_step()]
    if not held_out:
        following = dict.fromkeys(row for _ in range(steps) for row in sampler.next_step())
        seen = set(drawn)
        held_out = [train[row] for row in following if row not in seen]
    if not held_out:
        return SweepPlan((suggested,), why_none="no row is left to measure a sweep on")
    rows = _as_long_as(held_out, int(lengths_of(train)[drawn].sum()))
    rates = tuple(_rounded(suggested * times) for times in factors)
    return SweepPlan(rates, steps, (total_steps / steps) ** HORIZON, rows)


def _rounded(rate: float) -> float:
    """To three digits, so that it can be given again."""
    return float(f"{rate:.3g}")


def _as_long_as(rows: Sequence[EncodedExample], tokens: int) -> list[EncodedExample]:
    """The first rows, of so many tokens together at most, but one."""
    ends = lengths_of(rows).cumsum()
    return [rows[row] for row in range(max(1, int((ends <= tokens).sum())))]


class Loop(Protocol):
    """`train_loop` with all that a candidate and the whole run share."""

    def __call__(
        self,
        evaluations: Evaluations,
        options: LoopOptions,
        *,
        lr: float,
        sampler: StepSampler,
        total_steps: int,
        run: RunFolder,
        report: Listener,
        checkpoints: Checkpoints,
    ) -> LoopResult: ...


@dataclass(frozen=True)
class ChosenRate:
    """What --lr came to.

    Args:
        interrupted: by which signal the user stopped the sweep; the rate then means nothing.
    """

    lr: float
    interrupted: signal.Signals | None = None


def choose_lr(
    opened: Opened,
    examples: Examples,
    model: BatchModel,
    trained: Trained,
    loop: Loop,
    micro_batch_size: int,
    report: Listener,
) -> ChosenRate:
    """The rate that is given, that the run was settled on before it stopped, or that a sweep finds.

    Args:
        model: as training begins with it; so it is afterwards.
        trained: what of it is.
        micro_batch_size: most rows that an evaluation computes at once.
    """
    config, data, resumed = opened.config, examples.data, opened.resumed
    if config.loop.lr != "auto":
        return ChosenRate(config.loop.lr)
    compares, full = config.objective.objective in PREFERENCES, config.method.method == "full"
    suggested = suggested_lr(opened.source.config, config.adapters, compares, full)
    if resumed is not None:  # with other options than it began with, where a sweep's place is behind it
        return ChosenRate(resumed.state["settled"].get("lr", suggested))
    sampler = partial(StepSampler, len(data.train), config.memory.rows_per_step, config.data.seed, data.mixture)
    plan = plan_sweep(suggested, data.train, examples.evaluations.rows, sampler(), examples.num_steps)
    if plan.why_none:
        report(RateChosen(suggested, f"what the model's width suggests: {plan.why_none}"))
        return ChosenRate(suggested)
    measure = partial(validation_loss, examples.objective, model, plan.rows, micro_batch_size)
    losses, interrupted = _try_all(plan, opened, model, trained, loop, sampler, examples.num_steps, measure, report)
    if interrupted is not None:
        return ChosenRate(suggested, interrupted)
    draw_rates(losses, suggested, opened.run.rates_plot)
    chosen, why = _best(losses, suggested)
    report(RateChosen(chosen, why))
    return ChosenRate(chosen)


def _try_all(
    plan: SweepPlan,
    opened: Opened,
    model: BatchModel,
    trained: Trained,
    loop: Loop,
    sampler: Callable[[], StepSampler],
    total_steps: int,
    measure: Callable[[InterruptOnce], Measured],
    report: Listener,
) -> tuple[dict[float, float | None], signal.Signals | None]:
    """The held-out loss that each rate of `plan` leads to, None where a loss was not finite; and the signal by which
    the user stopped it. Adapters and random generators are as they were afterwards.
    """
    given = opened.config.loop
    warmup = max(min(1, given.warmup), round(plan.steps * warmup_steps(given.warmup, total_steps) / total_steps))
    options = given.model_copy(update={"warmup": warmup, "early_stopping_patience": None, "keep_best": False})
    rng, losses = capture_rng(model.device), dict[float, float | None]()
    with tempfile.TemporaryDirectory(dir=opened.run.path, prefix=TEMPORARY) as temporary, InterruptOnce() as interrupt:
        begins = Path(temporary) / "begins"
        begins.mkdir()
        trained.write(model.module, begins)
        for rate in tracked(plan.rates, "trying learning rates", report):
            run = RunFolder(Path(temporary) / f"{rate:g}")
            run.path.mkdir()
            try:
                result = loop(
                    Evaluations((), plan.steps),
                    options,
                    lr=rate * plan.factor,
                    sampler=sampler(),
                    total_steps=plan.steps,
                    run=run,
                    report=silent,
                    checkpoints=_no_checkpoints(run, plan.steps),
                )
                interrupt.requested = interrupt.requested or result.interrupted
                loss = measure(interrupt).loss
            except TrainingError:  # which the run itself will tell of, where not the rate is to blame
                loss = math.nan
            trained.restore(model.module, begins)
            if interrupt.requested:
                break
            losses[rate] = loss if math.isfinite(loss) else None
            report(RateTried(rate, losses[rate], plan.steps, rate * plan.factor))
    restore_rng(rng, model.device)
    return losses, interrupt.requested


def _no_checkpoints(run: RunFolder, steps: int) -> Checkpoints:
    """For a loop of so many steps: it is told that there is one of the last already."""
    return Checkpoints(
        run.checkpoints, save_every=f"{steps + 1}", keep=1, config="", about={}, settled={}, last_step=steps
    )


def _best(losses: dict[float, float | None], suggested: float) -> tuple[float, str]:
    """The rate of the lowest loss, and why."""
    finite = {rate: loss for rate, loss in losses.items() if loss is not None}
    if not finite:
        return suggested, "what the model's width suggests: no rate around it gave a finite loss"
    best = min(finite, key=finite.__getitem__)
    ends = {min(losses): "; it is the lowest that was tried", max(losses): "; it is the highest that was tried"}
    return best, f"the lowest held-out loss of {len(losses)} around {suggested:g}{ends.get(best, '')}"
