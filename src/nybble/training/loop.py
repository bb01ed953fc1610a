"""The training loop, visible from top to bottom in `train_loop`."""

import itertools
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from nybble.data.encoded_rows import lengths_of, supervised_of
from nybble.data.examples import EncodedExample
from nybble.data.packing import Batch
from nybble.data.sampler import StepSampler, split_micro_batches
from nybble.errors import PlanError, TrainingError, is_out_of_memory
from nybble.events import Listener, Note
from nybble.files.disk import complete_folder
from nybble.kernels.hardware import as_double
from nybble.kernels.heap import kept_heap, lies_in_heap, trim_heap
from nybble.layers.batch_model import BatchModel
from nybble.layers.convert import learning_rates
from nybble.memory.measure import PeakMemory, used_bytes
from nybble.options.groups import LoopOptions
from nybble.runs.folder import RunFolder
from nybble.runs.trained import Trained
from nybble.training.accumulation import GradientAccumulation
from nybble.training.checkpoint import Checkpoint, Checkpoints, Position, Progress
from nybble.training.evaluations import Evaluations
from nybble.training.events import HeldOutLoss, NotPaged, OutOfMemory, Step, StoppedEarly
from nybble.training.interrupt import InterruptOnce
from nybble.training.objective import Objective, Part
from nybble.training.optimizer import AdamW
from nybble.training.rng import capture_rng, restore_rng
from nybble.training.schedule import learning_rate, warmup_steps

TINY = 1e-30  # a norm of zero is not divided by


@dataclass(frozen=True)
class LoopResult:
    """What a finished or interrupted loop leaves behind; a loss is None where no evaluation came to its end, or no row
    is held out.
    """

    steps: int
    loss_before: float | None
    loss_after: float | None
    interrupted: signal.Signals | None


@dataclass(frozen=True)
class Rehearsal:
    """What is gone through once before the first step, because memory is limited.

    Args:
        rows, validation: of the largest micro-batches that training and evaluations will meet.
        check: given the peak in bytes, raises where it is too much.
    """

    rows: Sequence[EncodedExample]
    validation: Sequence[EncodedExample]
    check: Callable[[int], None]


def train_loop(
    model: BatchModel,
    objective: Objective,
    train: Sequence[EncodedExample],
    evaluations: Evaluations,
    options: LoopOptions,
    *,
    lr: float,
    optimizer_bits: Literal[32, 8],
    sampler: StepSampler,
    total_steps: int,
    micro_batch_size: int,
    run: RunFolder,
    trained: Trained,
    report: Listener,
    events_bytes: Callable[[], int],
    checkpoints: Checkpoints,
    resumed: Checkpoint | None = None,
    paged: bool = False,
    graphs: bool = True,
    rehearsal: Rehearsal | None = None,
) -> LoopResult:
    """Train `model` until `total_steps` optimizer steps are done, or the user interrupts.

    Args:
        model: what of it requires gradients is trained.
        objective: what is minimised over the rows of `train`.
        evaluations: which rows, and how often; without rows there are none.
        trained: how that is written.
        lr: the peak of the schedule.
        optimizer_bits: of AdamW's moments between steps.
        events_bytes: flushes the run's log to the disk and says its length, which a checkpoint keeps.
        resumed: where to go on, None at the beginning.
        paged: keep the optimizer's state in a file of the run folder.
        graphs: there is memory for those of micro-batches of few tokens, on a device that has any.
        rehearsal: what to go through once before the first step.

    Raises:
        TrainingError: a loss or gradient was not finite, or one row alone does not fit into memory. What
            was trained and a checkpoint are saved as before that step, and the message names the rows.
        RunError: a checkpoint could not be saved.
    """
    module, device, parameters = model.module, model.device, model.parameters()
    optimizer = AdamW(
        parameters,
        beta1=options.beta1,
        beta2=options.beta2,
        weight_decay=options.weight_decay,
        bits=optimizer_bits,
        rates=learning_rates(module, options.lora_plus_ratio),
        paged_in=run.path if paged else None,
    )
    forward_backward = GradientAccumulation(objective, model, graphs=graphs)
    num_warmup = warmup_steps(options.warmup, total_steps)
    lengths = lengths_of(train)
    torch.manual_seed(sampler.seed)  # dropout
    progress = Progress(0, micro_batch_size)
    if resumed is not None:
        progress = replace(
            resumed.restore(module, optimizer, trained, sampler, device), micro_batch_size=micro_batch_size
        )
    checkpoints.check_space(sum(parameter.numel() for parameter in parameters))

    keeps_heap = lies_in_heap(device) and model.packed  # else the heap is in pieces, and is trimmed as it goes

    def give_room() -> None:
        if keeps_heap:
            trim_heap()  # of what steps left free

    def evaluate_if_due() -> None:
        step = progress.step
        due = step % evaluations.every == 0 or step == total_steps
        if not due or step == progress.evaluated_step or not evaluations.rows:
            return
        give_room()
        found = validation_loss(objective, model, evaluations.rows, micro_batch_size, interrupt)
        if interrupt.requested:
            return
        report(HeldOutLoss(step, found.loss, found.supervised_tokens, objective.unit, found.metrics))
        if progress.evaluated(found.loss) and options.keep_best:
            with complete_folder(run.best) as temporary:
                trained.write(module, temporary)

    def stopped_early() -> bool:
        patience = options.early_stopping_patience
        return patience is not None and progress.evaluations_since >= patience

    def save(position: Position, last: bool) -> None:
        give_room()
        checkpoints.save(position, module, optimizer, trained, events_bytes())
        if last:
            trained.publish(module, run)

    with InterruptOnce() as interrupt, kept_heap(keeps_heap, slabs=model.verdict.path == "blocks"):
        if rehearsal is not None:
            with PeakMemory(device) as memory:
                try:
                    rehearse(objective, model, forward_backward, optimizer, rehearsal)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    raise _rehearsal_out_of_memory(rehearsal) from error
                checkpoints.rehearse(Position.now(progress, sampler, device), module, optimizer, trained)
            rehearsal.check(memory.peak_bytes)
        evaluate_if_due()
        while progress.step < total_steps and not interrupt.requested and not stopped_early():
            started = time.perf_counter()
            before = Position.now(progress, sampler, device)
            step, rows = progress.step + 1, sampler.next_step()
            drawn = {row: train[row] for row in rows}  # read once: they may lie on the disk
            model.train()
            micro_batches = [
                forward_backward.prepare(objective.collate([drawn[row] for row in micro], model))
                for micro in split_micro_batches(rows, lengths, progress.micro_batch_size, model.packed)
            ]
            parts: list[Part] = []
            out_of_memory = False
            try:
                # Of the whole step: how it is cut into micro-batches changes nothing.
                totals = objective.totals(model, [drawn[row] for row in rows], progress.micro_batch_size)
                for batch in micro_batches:
                    parts.append(forward_backward(batch, totals))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                out_of_memory = True  # what the step holds is freed once the exception is gone, below

            if out_of_memory:
                optimizer.drop_gradients()
                sampler.load_state(before.sampler)
                restore_rng(before.rng, device)
                if forward_backward.drop_graphs():
                    report(OutOfMemory(step, graphs=False))
                    continue
                # Room first: the same micro-batches again, with the state in a file, if the disk has room for it.
                if optimizer.can_page_out and paged_out(optimizer, run, report):
                    report(OutOfMemory(step, paged=True))
                    continue
                if progress.micro_batch_size == 1:
                    save(before, last=True)
                    raise _out_of_memory(step, micro_batches, run)
                progress.micro_batch_size = (progress.micro_batch_size + 1) // 2
                report(OutOfMemory(step, micro_batch_size=progress.micro_batch_size))
                continue
            # The one look at the device, which may be a GPU at work; before anything is updated.
            seen = [*(as_double(part.loss) for part in parts), optimizer.gradient_norm()]
            measured = [part.metrics for part in parts if part.metrics is not None]
            figures = torch.cat([torch.stack(seen), *([torch.stack(measured).sum(dim=0)] if measured else [])]).tolist()
            losses, grad_norm, metrics = figures[: len(parts)], figures[len(parts)], figures[len(seen) :]
            losses = list(itertools.accumulate(losses))
            for batch, total in zip(micro_batches, losses, strict=True):
                if not math.isfinite(total):
                    save(before, last=True)
                    suspects = [row for row in drawn.values() if row.origin in batch.rows]
                    raise _not_finite("loss", total, step, non_finite_rows(objective, model, suspects), run)
            if not math.isfinite(grad_norm):
                save(before, last=True)
                raise _not_finite("gradient norm", grad_norm, step, [row for b in micro_batches for row in b.rows], run)
            rate = learning_rate(step, total_steps, num_warmup, options.schedule, lr)
            optimizer.step(rate, grad_scale=min(1.0, options.max_grad_norm / max(grad_norm, TINY)))
            progress.step = step

            step_s = time.perf_counter() - started
            num_tokens = sum(batch.num_tokens for batch in micro_batches)
            report(
                Step(
                    step=step,
                    loss=losses[-1],
                    lr=rate,
                    grad_norm=grad_norm,
                    tokens=num_tokens,
                    supervised_tokens=sum(batch.supervised_tokens for batch in micro_batches),
                    step_s=step_s,
                    tokens_per_s=num_tokens / step_s,
                    memory_bytes=used_bytes(device),
                    metrics=dict(zip(objective.metrics, metrics, strict=True)),
                )
            )
            evaluate_if_due()
            if checkpoints.due(step):
                save(Position.now(progress, sampler, device), last=False)

        save(Position.now(progress, sampler, device), last=True)
        loss = progress.loss_after
        if stopped_early():
            assert progress.best_step is not None and progress.best_loss is not None
            report(StoppedEarly(progress.step, progress.best_step, progress.best_loss))
        if options.keep_best and not interrupt.requested and progress.best_step != progress.step:
            assert progress.best_step is not None
            trained.restore(module, run.best)  # what is asked of the model from here on is what the run keeps
            trained.publish(module, run)
            loss = progress.best_loss
            report(Note(f"what the run keeps is that of step {progress.best_step}, of the lowest held-out loss"))
    return LoopResult(progress.step, progress.loss_before, loss, interrupt.requested)


def rehearse(
    objective: Objective,
    model: BatchModel,
    forward_backward: GradientAccumulation,
    optimizer: AdamW,
    rehearsal: Rehearsal,
) -> None:
    """Take the memory of a run's heaviest moments: its largest micro-batch, every gradient and moment in place, and
    its largest evaluation.

    Nothing is learnt from it: gradients are dropped, moments stay as they were, random generators go back.
    """
    device = model.device
    batch = forward_backward.prepare(objective.collate(rehearsal.rows, model))
    rng = capture_rng(device)
    model.train()
    optimizer.materialise()
    forward_backward.rehearse(batch, objective.totals(model, rehearsal.rows, len(rehearsal.rows)))
    optimizer.drop_gradients()
    if rehearsal.validation:
        validation_loss(objective, model, rehearsal.validation, len(rehearsal.validation))
    restore_rng(rng, device)


def paged_out(optimizer: AdamW, run: RunFolder, report: Listener) -> bool:
    """Whether the optimizer's state went to a file; where the disk has no room, that is noted."""
    try:
        optimizer.page_out(run.path)
    except PlanError as error:
        report(NotPaged(error.got))
        return False
    return True


@dataclass(frozen=True)
class Measured:
    """What rows say.

    Args:
        loss: the mean over the objective's terms.
        metrics: the objective's, by name.
        supervised_tokens: of all rows.
    """

    loss: float
    metrics: dict[str, float]
    supervised_tokens: int


@torch.no_grad()
def validation_loss(
    objective: Objective,
    model: BatchModel,
    rows: Sequence[EncodedExample],
    micro_batch_size: int,
    interrupt: InterruptOnce | None = None,
) -> Measured:
    """Loss and metrics over `rows`, of which there are some.

    Once `interrupt` is requested it stops early; what it returns then means nothing.
    """
    was_training = model.training
    model.eval()
    totals = objective.totals(model, rows, micro_batch_size)
    sums: list[float] = []
    lengths = lengths_of(rows)
    for micro in split_micro_batches(range(len(rows)), lengths, micro_batch_size, model.packed):
        batch = objective.collate([rows[row] for row in micro], model).to(model.device)
        terms = objective.terms(model, batch, totals)
        sums = [
            total + as_double(row).sum().item() for total, row in zip(sums or [0.0] * len(terms), terms, strict=True)
        ]
        if interrupt is not None and interrupt.requested:
            break
    model.train(was_training)
    loss, *means = (total / float(totals.terms) for total in sums)
    return Measured(loss, objective.measured(means), int(supervised_of(rows).sum()))


@torch.no_grad()
def non_finite_rows(objective: Objective, model: BatchModel, rows: Sequence[EncodedExample]) -> list[str]:
    """Origins (file:line) of the rows whose own loss is not finite; of all rows if it is so only together."""

    def is_finite(row: EncodedExample) -> bool:
        batch = objective.collate([row], model).to(model.device)
        return bool(objective.terms(model, batch, objective.totals(model, [row], 1)).isfinite().all())

    return [row.origin for row in rows if not is_finite(row)] or [row.origin for row in rows]


def _not_finite(what: str, value: float, step: int, rows: Sequence[str], run: RunFolder) -> TrainingError:
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    return TrainingError(
        f"Step {step}: the {what} is {value}. Rows: {shown}.",
        f"Training needs finite numbers; what was trained, and a checkpoint, as before this step are in {run.path}.",
        "Look at those rows; or lower --lr, raise --warmup, or use --compute-dtype fp32. "
        f"To go on from there: nybble train --resume --out {run.path} --lr .. --allow-change config",
    )


def _rehearsal_out_of_memory(rehearsal: Rehearsal) -> TrainingError:
    return TrainingError(
        f"The rehearsal of the largest micro-batch ran out of memory: {len(rehearsal.rows)} rows, the longest of them "
        f"{rehearsal.rows[0].origin}.",
        "Nothing was trained.",
        "Lower --memory, so that another plan is chosen, or free what other programs hold.",
    )


def _out_of_memory(step: int, micro_batches: Sequence[Batch], run: RunFolder) -> TrainingError:
    return TrainingError(
        f"Step {step} ran out of memory with one row at a time, the longest of them {micro_batches[0].rows[0]}.",
        f"What was trained, and a checkpoint, as before this step are in {run.path}.",
        "Free memory and go on with `nybble train --resume --out ...`; or lower --max-seq-len, or use --keep nothing.",
    )
