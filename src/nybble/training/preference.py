"""Learning from pairs of a chosen and a rejected answer: DPO, IPO, SimPO, ORPO. Answers judged alone are in kto.py.

A pair's loss is a formula over two sums of log-probabilities, of all tokens of each answer; the step's is the mean over
its pairs. d loss / d log p is one number a sequence, which the loss head's rows are multiplied with
(`layers/log_probs.py`): no logits are kept, and there is no second model. The reference is the model that training
begins with (`training/reference.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nybble.data.examples import EncodedExample
from nybble.data.packing import Batch
from nybble.data.preference_rows import EncodedPair, PreferenceBatch, PreferenceRow, compare
from nybble.data.preferences import PAIR_ROWS, WHOLE_PAIR_ROWS
from nybble.data.prepare import RowKind
from nybble.kernels.hardware import as_double
from nybble.layers.causal_lm import CausalLM
from nybble.training.objective import NextTokens, Part, Totals
from nybble.training.reference import reference_of

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
LOG_P = ("logps/chosen", "logps/rejected")


class Answers(NamedTuple):
    """One side of a batch's pairs, fp64 `(pairs,)` each.

    Args:
        log_p: summed over the answer's tokens, nats.
        tokens: of the answer.
        reference: as `log_p`, by the reference; zeros where the objective has none.
        nll: summed −log p of all targets, those of a prompt that is learnt too.
    """

    log_p: Tensor
    tokens: Tensor
    reference: Tensor
    nll: Tensor

    @property
    def ratio(self) -> Tensor:
        """log p / reference's p."""
        return self.log_p - self.reference

    @property
    def mean(self) -> Tensor:
        """log p a token."""
        return self.log_p / self.tokens


class Compared(NamedTuple):
    """Losses of pairs, the rewards of their answers, and the log-probabilities that are told; `(pairs,)` each."""

    losses: Tensor
    rewards: tuple[Tensor, Tensor]
    log_p: tuple[Tensor, Tensor]
    more: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class PairTotals(Totals):
    """What a step's micro-batches of pairs share.

    Args:
        chosen_targets: tokens that are predicted of chosen documents.
    """

    chosen_targets: int


class PreferenceObjective(NextTokens):
    """The mean of a term a row, made of log-probabilities of whole answers; subclasses say which."""

    kind: ClassVar[RowKind]
    metrics: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[str]
    capturable: ClassVar[bool] = False  # a reference, and what a step shares, are no tensors of the batch
    has_reference: ClassVar[bool] = True

    def terms_of(self, model: CausalLM, batch: PreferenceBatch, totals: Any) -> Tensor:
        """Loss and metrics of each row, fp64 `(1 + M, rows)`, the loss with its gradient."""
        raise NotImplementedError

    def collate(self, rows: Sequence[EncodedExample], model: CausalLM) -> PreferenceBatch:
        """As `Objective` says."""
        return compare([row for row in rows if isinstance(row, PreferenceRow)], model.packed, model.shares)

    def loss(self, model: CausalLM, batch: Batch, totals: Any) -> Part:
        """As `Objective` says."""
        assert isinstance(batch, PreferenceBatch)
        terms = self.terms_of(model, batch, totals)
        return Part((terms[0].sum() / totals.terms).float(), terms[1:].detach().sum(dim=1) / totals.terms)

    @torch.no_grad()
    def terms(self, model: CausalLM, batch: Batch, totals: Any) -> Tensor:
        """As `Objective` says."""
        assert isinstance(batch, PreferenceBatch)
        return self.terms_of(model, batch, totals)


class PairObjective(PreferenceObjective):
    """The mean over pairs of a formula, which is all that subclasses say."""

    kind = PAIR_ROWS
    metrics: ClassVar[tuple[str, ...]] = (*REWARDS, *LOG_P)
    unit = "a pair"

    def compare(self, chosen: Answers, rejected: Answers, totals: PairTotals) -> Compared:
        """The formula."""
        raise NotImplementedError

    def totals(self, model: CausalLM, rows: Sequence[EncodedExample], micro_batch_size: int) -> PairTotals:
        """As `Objective` says."""
        pairs = [row for row in rows if isinstance(row, EncodedPair)]
        whole = [row.border - 1 if row.learns_prompt else row.documents[0].supervised_tokens for row in pairs]
        return PairTotals(len(pairs), sum(whole))

    def terms_of(self, model: CausalLM, batch: PreferenceBatch, totals: PairTotals) -> Tensor:
        """As `PreferenceObjective` says."""
        reference = reference_of(model, batch) if self.has_reference else torch.zeros_like(batch.answer_tokens)
        log_p = as_double(model.log_probs(batch))  # (N,)
        weights = batch.supervised_weights
        answers = batch.sums(log_p if weights is None else log_p * weights)
        parts = answers, batch.answer_tokens, reference, batch.sums(-log_p)
        chosen, rejected = Answers(*(part[::2] for part in parts)), Answers(*(part[1::2] for part in parts))
        found = self.compare(chosen, rejected, totals)
        good, bad = found.rewards
        metrics = (good, bad, good - bad, (good > bad).to(good.dtype), *found.log_p, *found.more)
        return torch.stack([found.losses, *(metric.detach() for metric in metrics)])


@dataclass(frozen=True)
class DPO(PairObjective):
    """−log σ(β · (ratio of chosen − ratio of rejected)), a ratio being log p / reference's p.

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7. With label smoothing ε a pair counts as the other way round in ε of
    all cases: conservative DPO (Mitchell 2023), −(1 − ε) · log σ(x) − ε · log σ(−x).
    """

    beta: float
    label_smoothing: float = 0.0

    def compare(self, chosen: Answers, rejected: Answers, totals: PairTotals) -> Compared:
        """As `PairObjective` says."""
        rewards = self.beta * chosen.ratio, self.beta * rejected.ratio
        losses = smoothed(rewards[0] - rewards[1], self.label_smoothing)
        return Compared(losses, rewards, (chosen.log_p, rejected.log_p))


@dataclass(frozen=True)
class IPO(PairObjective):
    """(ratio a token of chosen − ratio a token of rejected − 1 / 2β)².

    Azar et al. 2023 (arXiv 2310.12036), eq. 17, over means of tokens, as its authors and TRL compute it.
    """

    beta: float

    def compare(self, chosen: Answers, rejected: Answers, totals: PairTotals) -> Compared:
        """As `PairObjective` says."""
        difference = chosen.ratio / chosen.tokens - rejected.ratio / rejected.tokens
        rewards = self.beta * chosen.ratio, self.beta * rejected.ratio
        return Compared((difference - 1 / (2 * self.beta)).square(), rewards, (chosen.log_p, rejected.log_p))


@dataclass(frozen=True)
class SimPO(PairObjective):
    """−log σ(β · (log p a token of chosen − log p a token of rejected) − γ); there is no reference.

    Meng et al. 2024 (arXiv 2405.14734), eq. 6. Label smoothing as in `DPO`.
    """

    beta: float
    gamma: float
    label_smoothing: float = 0.0
    has_reference = False

    def compare(self, chosen: Answers, rejected: Answers, totals: PairTotals) -> Compared:
        """As `PairObjective` says."""
        rewards = self.beta * chosen.mean, self.beta * rejected.mean
        losses = smoothed(rewards[0] - rewards[1] - self.gamma, self.label_smoothing)
        return Compared(losses, rewards, (chosen.mean, rejected.mean))


@dataclass(frozen=True)
class ORPO(PairObjective):
    """Mean −log p over all tokens of chosen documents, less λ · log σ(log odds of chosen − log odds of rejected).

    Hong et al. 2024 (arXiv 2403.07691), eq. 6 and 7: an answer's odds are p / (1 − p) of its geometric mean a token.
    As in TRL the first part is over prompt and answer. There is no reference.
    """

    lambda_: float
    kind = WHOLE_PAIR_ROWS
    metrics = (*REWARDS, *LOG_P, "nll_loss", "log_odds_ratio")
    has_reference = False

    def compare(self, chosen: Answers, rejected: Answers, totals: PairTotals) -> Compared:
        """As `PairObjective` says."""
        log_odds = _log_odds(chosen.mean) - _log_odds(rejected.mean)
        ratio = logsigmoid(log_odds)
        nll = chosen.nll * (totals.terms / totals.chosen_targets)  # the mean over pairs is that over tokens
        rewards = self.lambda_ * chosen.mean, self.lambda_ * rejected.mean
        return Compared(nll - self.lambda_ * ratio, rewards, (chosen.mean, rejected.mean), (nll, ratio))


def smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    """−(1 − ε) · log σ(margin) − ε · log σ(−margin)."""
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 − p))."""
    return log_p - torch.log(-torch.expm1(log_p))
