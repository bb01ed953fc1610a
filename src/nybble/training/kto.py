"""Learning from answers that are good or bad, each by itself: KTO."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.data.examples import EncodedExample
from nybble.data.preference_rows import JudgedAnswer, PreferenceBatch, with_mismatched
from nybble.data.preferences import JUDGED_ROWS
from nybble.kernels.hardware import as_double
from nybble.layers.causal_lm import CausalLM
from nybble.training.objective import Totals
from nybble.training.preference import LOG_P, REWARDS, PreferenceObjective
from nybble.training.reference import adapters_off, answer_log_probs, reference_of


@dataclass(frozen=True)
class KtoTotals(Totals):
    """What a step's micro-batches of judged answers share.

    Args:
        desirable: rows whose answer is good.
        kl: how far the model is from its reference, nats, at least 0.
    """

    desirable: int
    kl: float


@dataclass(frozen=True)
class KTO(PreferenceObjective):
    """w · (1 − σ(β · (ratio − kl))) of good answers, w · (1 − σ(β · (kl − ratio))) of bad ones; their mean over rows.

    Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 7; a ratio is log p / reference's p. kl is the mean ratio of answers
    that belong to other prompts, at least 0 and without a gradient, over all rows of a step: how the step is cut into
    micro-batches changes nothing. Which answer a prompt is given, `with_mismatched` says.
    """

    beta: float
    desirable_weight: float
    undesirable_weight: float
    kind = JUDGED_ROWS
    metrics = (*REWARDS[:3], *LOG_P, "kl")
    unit = "a row"

    def complete(self, rows: Sequence[EncodedExample], seed: int, max_seq_len: int) -> Sequence[EncodedExample]:
        """As `Objective` says: each row needs another's answer."""
        return with_mismatched(rows, seed, max_seq_len)

    def totals(self, model: CausalLM, rows: Sequence[EncodedExample], micro_batch_size: int) -> KtoTotals:
        """As `Objective` says: one forward pass over the mismatched answers, two where their reference is not known."""
        judged = [row for row in rows if isinstance(row, JudgedAnswer)]
        mismatched = [row.mismatched for row in judged if row.mismatched is not None]
        ratios = answer_log_probs(model, mismatched, micro_batch_size)
        if all(row.reference for row in judged):
            ratios -= torch.tensor([row.reference[1] for row in judged], dtype=torch.float64)
        else:
            with adapters_off(model):
                ratios -= answer_log_probs(model, mismatched, micro_batch_size)
        kl = max(0.0, float(ratios.mean()))
        return KtoTotals(len(judged), sum(row.desirable for row in judged), kl)

    def terms_of(self, model: CausalLM, batch: PreferenceBatch, totals: KtoTotals) -> Tensor:
        """As `PreferenceObjective` says."""
        assert batch.desirable is not None
        reference = reference_of(model, batch)
        log_p = batch.sums(as_double(model.log_probs(batch)))  # (rows,)
        ratio, good = log_p - reference, as_double(batch.desirable)
        sign = 2 * good - 1
        weights = self.desirable_weight * good + self.undesirable_weight * (1 - good)
        losses = weights * (1 - torch.sigmoid(self.beta * sign * (ratio - totals.kl)))
        # A mean over the good rows alone is one over all, of terms scaled so; 0 where there are none.
        scale_good = good * (totals.terms / max(1, totals.desirable))
        scale_bad = (1 - good) * (totals.terms / max(1, totals.terms - totals.desirable))
        reward = self.beta * ratio
        metrics = (
            *(scale_good * reward, scale_bad * reward, (scale_good - scale_bad) * reward),
            *(scale_good * log_p, scale_bad * log_p),
            torch.full_like(reward, totals.kl),
        )
        return torch.stack([losses, *(metric.detach() for metric in metrics)])
