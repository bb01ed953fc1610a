"""The training loop, visible from top to bottom in `train_loop`."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nybble.config import TrainConfig
from nybble.data.examples import EncodedExample
from nybble.data.packing import Batch, pack, pad
from nybble.data.sampler import StepSampler, split_micro_batches
from nybble.errors import TrainingError
from nybble.layers.backbone import Backbone
from nybble.layers.loss_head import LossHead
from nybble.layers.peft_format import write_adapter
from nybble.memory.measure import used_bytes
from nybble.training.display import Display
from nybble.training.events import EventLog
from nybble.training.interrupt import InterruptOnce
from nybble.training.optimizer import AdamW
from nybble.training.run_folder import RunFolder, complete_folder
from nybble.training.schedule import learning_rate, warmup_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TINY = 1e-30  # a norm of zero is not divided by
EVALUATIONS_PER_RUN = 5  # when --eval-every is not given


@dataclass(frozen=True)
class LoopResult:
    """What a finished or interrupted loop leaves behind."""

    steps: int
    loss_before: float
    loss_after: float
    interrupted: bool


def train_loop(
    model: "PreTrainedModel",
    train: Sequence[EncodedExample],
    validation: Sequence[EncodedExample],
    config: TrainConfig,
    *,
    sampler: StepSampler,
    total_steps: int,
    micro_batch_size: int,
    backbone: Backbone,
    run: RunFolder,
    adapter_config: dict[str, object],
    events: EventLog,
    display: Display,
) -> LoopResult:
    """Train the adapters of `model` for `total_steps` optimizer steps.

    Args:
        model: frozen base with adapters attached; only they require gradients.
        backbone: runs micro-batches through the model.

    Raises:
        TrainingError: a loss or gradient was not finite. The adapter as it was before that step is in
            `run.adapter`, and the message names the rows.
    """
    device = next(model.parameters()).device
    head = LossHead.of(model)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(adapters, beta1=config.beta1, beta2=config.beta2, weight_decay=config.weight_decay)
    num_warmup = warmup_steps(config.warmup, total_steps)
    eval_every = config.eval_every or max(1, total_steps // EVALUATIONS_PER_RUN)
    lengths = [len(example) for example in train]
    torch.manual_seed(config.seed)  # dropout

    def evaluate(step: int) -> float:
        loss, num_tokens = held_out_loss(backbone, head, validation, micro_batch_size)
        events.write("eval", step=step, loss=loss, supervised_tokens=num_tokens)
        display.evaluated(step, loss)
        return loss

    def save(folder: Path) -> None:
        with complete_folder(folder) as temporary:
            write_adapter(model, temporary, adapter_config)

    loss_before = loss_after = evaluate(0)
    step, evaluated_step = 0, 0
    with InterruptOnce() as interrupt:
        for step, rows in zip(range(1, total_steps + 1), sampler.steps(), strict=False):
            started = time.perf_counter()
            model.train()
            micro_batches = [
                collate([train[row] for row in micro], backbone.packing).to(device)
                for micro in split_micro_batches(rows, lengths, micro_batch_size, backbone.packing)
            ]
            # One denominator for the whole step: how it is cut into micro-batches changes nothing.
            num_supervised = sum(batch.supervised_tokens for batch in micro_batches)
            step_loss = 0.0
            for batch in micro_batches:
                loss = head.loss(*supervised_states(backbone, batch), num_supervised)
                step_loss += loss.item()
                if not math.isfinite(step_loss):
                    save(run.adapter)
                    bad = non_finite_rows(
                        backbone, head, [train[row] for row in rows if train[row].origin in batch.rows]
                    )
                    raise _not_finite("loss", step_loss, step, bad, run)
                loss.backward()

            grad_norm = optimizer.gradient_norm()
            if not math.isfinite(grad_norm):
                save(run.adapter)
                raise _not_finite("gradient norm", grad_norm, step, [row for b in micro_batches for row in b.rows], run)
            lr = learning_rate(step, total_steps, num_warmup, config.schedule, config.lr)
            optimizer.step(lr, grad_scale=min(1.0, config.max_grad_norm / max(grad_norm, TINY)))

            step_s = time.perf_counter() - started
            num_tokens = sum(batch.num_tokens for batch in micro_batches)
            record = {
                "step": step,
                "loss": step_loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens": num_tokens,
                "supervised_tokens": num_supervised,
                "step_s": step_s,
                "tokens_per_s": num_tokens / step_s,
                "memory_bytes": used_bytes(device),
            }
            events.write("step", **record)
            display.stepped(record)
            if step % eval_every == 0 or step == total_steps:
                loss_after, evaluated_step = evaluate(step), step
            if config.save_every and step % config.save_every == 0:
                save(run.checkpoint(step))
            if interrupt.requested:
                break

        save(run.adapter)
        if evaluated_step != step and not interrupt.requested:
            loss_after = evaluate(step)
    return LoopResult(step, loss_before, loss_after, interrupt.requested)


def collate(rows: Sequence[EncodedExample], packing: bool) -> Batch:
    """The rows of one micro-batch, side by side or padded."""
    return pack(rows) if packing else pad(rows)


def supervised_states(backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states of the supervised positions `(N, hidden)` and their targets `(N,)`."""
    positions = batch.supervised_positions
    states = backbone.states(batch.input_ids, batch.position_ids, positions, batch.cu_seqlens, batch.attention_mask)
    return states, batch.targets.flatten()[positions]


@torch.no_grad()
def held_out_loss(
    backbone: Backbone, head: LossHead, rows: Sequence[EncodedExample], micro_batch_size: int
) -> tuple[float, int]:
    """Mean loss in nats per supervised token over `rows`, and the number of those tokens."""
    was_training = backbone.model.training
    backbone.model.eval()
    total, num_tokens = 0.0, 0
    lengths = [len(row) for row in rows]
    for micro in split_micro_batches(range(len(rows)), lengths, micro_batch_size, backbone.packing):
        batch = collate([rows[row] for row in micro], backbone.packing).to(head.weight.device)
        total += head.token_losses(*supervised_states(backbone, batch)).double().sum().item()
        num_tokens += batch.supervised_tokens
    backbone.model.train(was_training)
    return total / num_tokens, num_tokens


@torch.no_grad()
def non_finite_rows(backbone: Backbone, head: LossHead, rows: Sequence[EncodedExample]) -> list[str]:
    """Origins (file:line) of the rows whose own loss is not finite; of all rows if it is so only together."""

    def is_finite(row: EncodedExample) -> bool:
        batch = collate([row], backbone.packing).to(head.weight.device)
        return bool(head.token_losses(*supervised_states(backbone, batch)).isfinite().all())

    return [row.origin for row in rows if not is_finite(row)] or [row.origin for row in rows]


def _not_finite(what: str, value: float, step: int, rows: Sequence[str], run: RunFolder) -> TrainingError:
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    return TrainingError(
        f"Step {step}: the {what} is {value}. Rows: {shown}.",
        f"Training needs finite numbers; the adapter as it was before this step is in {run.adapter}.",
        "Look at those rows; or lower --lr, raise --warmup, or use --compute-dtype fp32.",
    )
