"""Learning from a teacher's distributions of the next token beside the examples' own answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nybble.data import packing
from nybble.data.examples import EncodedExample, extended
from nybble.data.packing import Batch
from nybble.kernels.hardware import as_double
from nybble.layers.causal_lm import CausalLM
from nybble.layers.distillation import Distilled, Mixture, TeacherRows
from nybble.layers.loss_head import weighted
from nybble.training.objective import Part, SupervisedFineTuning, Totals


@dataclass(frozen=True, eq=False, kw_only=True)
class TaughtExample(EncodedExample):
    """An example with what a teacher says of each of its N targets.

    Args:
        teacher_ids: int32 `(N, k)`, its likeliest tokens.
        teacher_log_p: fp16 `(N, k + 1)`, their log-probabilities, and that of all others together.
    """

    teacher_ids: Tensor
    teacher_log_p: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class TaughtBatch(Batch):
    """A micro-batch of them.

    Args:
        teacher_ids: int64 `(supervised_tokens, k)`, in the order of `supervised_positions`.
        teacher_log_p: fp32 `(supervised_tokens, k + 1)`.
    """

    teacher_ids: Tensor
    teacher_log_p: Tensor


@dataclass(frozen=True)
class Distillation(SupervisedFineTuning):
    """The mean over supervised tokens of α · T² · KL(teacher || student) + (1 − α) · (−log p); where the batch has
    weights, each term times its own (`layers/distillation.py`).

    Its metrics: the KL at the temperature and −log p, with these weights, and the share of tokens of which the
    student's likeliest is the teacher's.
    """

    mixture: Mixture
    metrics: ClassVar[tuple[str, ...]] = ("kl", "cross_entropy", "agreement")
    unit = "nats per supervised token, distilled"

    def collate(self, rows: Sequence[EncodedExample], model: CausalLM) -> Batch:
        """As `Objective` says."""
        batch = packing.collate(rows, model.packed)
        taught = [row for row in rows if isinstance(row, TaughtExample)]
        assert len(taught) == len(rows), "rows that no teacher was asked about"
        return extended(
            batch,
            TaughtBatch,
            teacher_ids=torch.cat([row.teacher_ids for row in taught]).long(),
            teacher_log_p=torch.cat([row.teacher_log_p for row in taught]).float(),
        )

    def loss(self, model: CausalLM, batch: Batch, totals: Totals) -> Part:
        """As `Objective` says."""
        criterion, targets, weights = self._criterion(model, batch), batch.supervised_targets, batch.supervised_weights
        loss, told = model.head.judge(criterion, model.hidden(batch), targets, totals.terms, weights)
        return Part(loss, as_double(_counted(told, weights)).sum(dim=1) / totals.terms)

    @torch.no_grad()
    def terms(self, model: CausalLM, batch: Batch, totals: Totals) -> Tensor:
        """As `Objective` says."""
        criterion = self._criterion(model, batch)
        return _counted(
            model.head.figures(criterion, model.hidden(batch), batch.supervised_targets), batch.supervised_weights
        )

    def _criterion(self, model: CausalLM, batch: Batch) -> Distilled:
        assert isinstance(batch, TaughtBatch)
        model.check_targets(batch)
        return Distilled(TeacherRows(batch.teacher_ids, batch.teacher_log_p), self.mixture)


def _counted(told: Tensor, weights: Tensor | None) -> Tensor:
    """Figures `(K, N)`, all but the last, which is a share of tokens, times the tokens' weights."""
    return torch.cat([weighted(told[:-1].T, weights).T, told[-1:]])
