"""A reward model: a number for an answer, learnt from pairs of which one answer is the better.

That the chosen answer wins has the probability σ(r(chosen) − r(rejected)) (Bradley and Terry 1952); the loss is its
−log (Ouyang et al. 2022, arXiv 2203.02155, eq. 1), less a margin where the pair has one (Touvron et al. 2023, arXiv
2307.09288, eq. 2). A number is read from the state at the end of the whole conversation, as in TRL.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nybble.data.examples import EncodedExample
from nybble.data.packing import Batch
from nybble.data.prepare import PreparedData, RowKind
from nybble.data.reward_rows import SCORED_PAIR_ROWS, pairs_of
from nybble.data.text_rows import TextBatch, texts_of
from nybble.kernels.hardware import as_double
from nybble.layers.batch_model import BatchModel
from nybble.layers.scored import ScoredModel
from nybble.sources.stored_model import StoredModel
from nybble.sources.task import REWARD, Task
from nybble.training.classify import labels_of_head
from nybble.training.objective import Part, Totals
from nybble.training.preference import REWARDS


@dataclass(frozen=True)
class RewardModelling:
    """The mean over pairs of −log σ(r(chosen) − r(rejected) − margin) + c · (r(chosen) + r(rejected))².

    Args:
        centring: c, which keeps rewards around zero (Eisenstein et al. 2023, arXiv 2312.09244, eq. 2).
        task: with the name of the checkpoint's own head, where that gives one number.
    """

    centring: float = 0.0
    task: Task = REWARD
    capturable: ClassVar[bool] = False
    model: ClassVar[type[BatchModel]] = ScoredModel
    kind: ClassVar[RowKind] = SCORED_PAIR_ROWS
    metrics: ClassVar[tuple[str, ...]] = REWARDS
    unit: ClassVar[str] = "nats a pair"

    def settled(self, data: PreparedData, source: StoredModel, recorded: Task | None) -> "RewardModelling":
        """As `Objective` says: a head of the checkpoint that gives one number is taken."""
        if recorded is not None and len(recorded.labels) == 1:
            return replace(self, task=recorded)
        known = labels_of_head(source)
        return replace(self, task=replace(REWARD, labels=known, stored_head=True)) if len(known) == 1 else self

    def complete(self, rows: Sequence[EncodedExample], seed: int, max_seq_len: int) -> Sequence[EncodedExample]:
        """As `Objective` says: they need nothing."""
        return rows

    def collate(self, rows: Sequence[EncodedExample], model: Any) -> TextBatch:
        """As `Objective` says: two texts a pair."""
        pairs = pairs_of(rows)
        batch: TextBatch = model.collate(texts_of(pairs), [pair.shared_tokens for pair in pairs])
        return batch

    def totals(self, model: Any, rows: Sequence[EncodedExample], micro_batch_size: int) -> Totals:
        """Count the pairs."""
        return Totals(len(rows))

    def loss(self, model: Any, batch: Batch, totals: Totals) -> Part:
        """As `Objective` says."""
        terms = self._terms(model, batch)
        return Part((terms[0].sum() / totals.terms).float(), terms[1:].detach().sum(dim=1) / totals.terms)

    @torch.no_grad()
    def terms(self, model: Any, batch: Batch, totals: Totals) -> Tensor:
        """As `Objective` says."""
        return self._terms(model, batch)

    def measured(self, means: Sequence[float]) -> dict[str, float]:
        """As `Objective` says: the metrics of steps."""
        return dict(zip(self.metrics, means, strict=True))

    def _terms(self, model: Any, batch: Batch) -> Tensor:
        """Loss and metrics of each pair, fp64 `(1 + M, pairs)`, the loss with its gradient."""
        assert isinstance(batch, TextBatch)
        chosen, rejected = as_double(model.scores(batch)[:, 0]).view(-1, 2).T
        margins = as_double(batch.labels[::2])
        losses = self.centring * (chosen + rejected).square() - logsigmoid(chosen - rejected - margins)
        metrics = (chosen, rejected, chosen - rejected, (chosen > rejected).to(chosen.dtype))
        return torch.stack([losses, *(metric.detach() for metric in metrics)])
