"""Learning to embed texts: near texts near each other, others apart.

Of each anchor the cosines with all positives and negatives of the step are scaled, and the loss is −log of the
softmax's part of its own positive (InfoNCE, van den Oord et al. 2018, arXiv 1807.03748; with the other rows' texts as
negatives Henderson et al. 2017, arXiv 1705.00652), as sentence-transformers' MultipleNegativesRankingLoss has it. Of
pairs with scores it is CoSENT (Su 2022, kexue.fm/archives/8847): log(1 + Σ exp(scale · (cos of a pair − cos of a nearer
one))) over all two pairs of the step, so that only the order of scores counts.

The loss is of the whole step, whatever micro-batches it is cut into (GradCache, Gao et al. 2021, arXiv 2101.06983): all
texts are embedded without a gradient first, the loss's gradient by each embedding is taken, and each micro-batch,
computed once more with the same things dropped, sends its own part of that back.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.data.embedding_rows import COMPARED_ROWS, ComparedTexts, compared_of, has_scores, numbered, text_keys
from nybble.data.encoded_rows import EncodedRows
from nybble.data.examples import EncodedExample, extended
from nybble.data.packing import Batch
from nybble.data.prepare import PreparedData, RowKind
from nybble.data.sampler import split_micro_batches
from nybble.data.text_rows import TextBatch, texts_of
from nybble.kernels.hardware import as_double
from nybble.layers.batch_model import BatchModel
from nybble.layers.embedded import EmbeddedModel
from nybble.options.objective_groups import Pooling
from nybble.sources.skeleton import is_encoder
from nybble.sources.stored_model import StoredModel
from nybble.sources.task import STATES, Task
from nybble.training.objective import Part, Totals
from nybble.training.rng import capture_rng, restore_rng

NEAREST = ("accuracy", "mrr")
RANKS = ("spearman",)


@dataclass(frozen=True, eq=False, kw_only=True)
class ComparedBatch(TextBatch):
    """A micro-batch of rows of texts.

    Args:
        numbers: of the rows.
    """

    numbers: tuple[int, ...]


@dataclass(frozen=True)
class EmbeddingTotals(Totals):
    """What a step's micro-batches share.

    Args:
        found: fp64 `(1 + M,)` of each row, by its number: its loss and its metrics.
        gradients: fp64 `(texts, hidden)` of each row, of the step's loss by the embeddings of its texts; none in
            evaluations.
    """

    found: dict[int, Tensor]
    gradients: dict[int, Tensor]


@dataclass(frozen=True)
class Embedding:
    """The mean over anchors of −log p(own positive), or CoSENT where pairs have scores.

    Args:
        pooling: as the user has it; None leaves it to the model.
        scale: of cosines.
        task: with the pooling, once the model is known.
        scored: pairs have scores.
    """

    pooling: Pooling | None
    scale: float
    task: Task = STATES
    scored: bool = False
    capturable: ClassVar[bool] = False
    model: ClassVar[type[BatchModel]] = EmbeddedModel
    kind: ClassVar[RowKind] = COMPARED_ROWS

    @property
    def metrics(self) -> tuple[str, ...]:
        """Of anchors how often their own positive is nearest, and the mean of 1 / its rank; of pairs with scores how
        alike the orders of cosines and scores are.
        """
        return RANKS if self.scored else NEAREST

    @property
    def unit(self) -> str:
        """Of the loss."""
        return "(CoSENT)" if self.scored else "nats an anchor"

    def settled(self, data: PreparedData, source: StoredModel, recorded: Task | None) -> "Embedding":
        """As `Objective` says: with the pooling of the options, of the run's record, of the model's files, or the usual
        one of its kind.
        """
        own = source.pooling or ("mean" if is_encoder(source.config) else "last")
        pooling = self.pooling or (recorded and recorded.pooling) or own
        return replace(self, task=replace(STATES, pooling=pooling), scored=has_scores(data.train))

    def complete(self, rows: Sequence[EncodedExample], seed: int, max_seq_len: int) -> EncodedRows:
        """Each row with its number."""
        return numbered(rows)

    def collate(self, rows: Sequence[EncodedExample], model: Any) -> ComparedBatch:
        """As `Objective` says: each row's texts, one after another."""
        compared = compared_of(rows)
        batch: TextBatch = model.collate(texts_of(compared))
        return extended(batch, ComparedBatch, numbers=tuple(row.number for row in compared))

    def totals(self, model: Any, rows: Sequence[EncodedExample], micro_batch_size: int) -> EmbeddingTotals:
        """As `Objective` says: all texts are embedded, and compared."""
        compared, learns = compared_of(rows), model.training
        embeddings = as_double(self._embed(model, compared, micro_batch_size))
        with torch.set_grad_enabled(learns):
            found = self.terms_of(embeddings.requires_grad_(learns), compared)  # (1 + M, rows)
        gradients: dict[int, Tensor] = {}
        if learns:
            (gradient,) = torch.autograd.grad(found[0].sum() / len(compared), embeddings)
            gradients = _by_number(compared, gradient.split([len(row.lengths) for row in compared]))
        return EmbeddingTotals(len(compared), _by_number(compared, found.detach().T), gradients)

    def loss(self, model: Any, batch: Batch, totals: EmbeddingTotals) -> Part:
        """As `Objective` says: the value that all rows together gave, with the gradient that they gave."""
        assert isinstance(batch, ComparedBatch)
        embeddings = as_double(self._embeddings(model, batch))
        towards = (embeddings * torch.cat([totals.gradients[number] for number in batch.numbers])).sum()
        found = self.terms(model, batch, totals).sum(dim=1) / totals.terms
        return Part((towards - towards.detach() + found[0]).float(), found[1:])

    def terms(self, model: Any, batch: Batch, totals: EmbeddingTotals) -> Tensor:
        """As `Objective` says: those that all rows together gave."""
        assert isinstance(batch, ComparedBatch)
        return torch.stack([totals.found[number] for number in batch.numbers], dim=1)

    def measured(self, means: Sequence[float]) -> dict[str, float]:
        """As `Objective` says: the metrics of steps, among all rows that are evaluated."""
        return dict(zip(self.metrics, means, strict=True))

    def terms_of(self, embeddings: Tensor, rows: Sequence[ComparedTexts]) -> Tensor:
        """Loss and metrics of each row, `(1 + M, rows)`.

        Args:
            embeddings: fp64 `(texts, hidden)`, of length 1, of all their texts, one row after another.
        """
        counts = torch.tensor([len(row.lengths) for row in rows], device=embeddings.device)
        first = counts.cumsum(0) - counts  # of each row's texts: its anchor
        anchors = embeddings[first]
        if self.scored:
            scores = torch.tensor([row.score for row in rows], dtype=embeddings.dtype, device=embeddings.device)
            cosines = (anchors * embeddings[first + 1]).sum(dim=1)
            alike = embeddings.new_tensor(spearman(cosines.tolist(), scores.tolist()))
            return torch.stack([each.expand(len(rows)) for each in (cosent(cosines, scores, self.scale), alike)])
        candidates = torch.ones(len(embeddings), dtype=torch.bool, device=embeddings.device)
        candidates[first] = False
        own = first - torch.arange(len(rows), device=embeddings.device)  # among them, the anchors before it left out
        return contrast(anchors, embeddings[candidates], own, same_texts(rows).to(embeddings.device), self.scale)

    @torch.no_grad()
    def _embed(self, model: Any, rows: Sequence[ComparedTexts], micro_batch_size: int) -> Tensor:
        """The embeddings of all texts of the rows, one after another, `(texts, hidden)`. Micro-batches are those that
        the loop makes, and drop what they will drop there.
        """
        found: dict[int, Tensor] = {}
        rng = capture_rng(model.device)
        for micro in _dealt(rows, micro_batch_size, model.packed):
            batch = self.collate(micro, model).to(model.device)
            parts = self._embeddings(model, batch).split([len(row.lengths) for row in micro])
            found |= zip(batch.numbers, parts, strict=True)
        restore_rng(rng, model.device)
        return torch.cat([found[row.number] for row in rows])

    def _embeddings(self, model: Any, batch: TextBatch) -> Tensor:
        assert self.task.pooling is not None
        embeddings: Tensor = model.embeddings(batch, self.task.pooling)
        return embeddings


def _dealt(rows: Sequence[ComparedTexts], micro_batch_size: int, packed: bool) -> list[list[ComparedTexts]]:
    """The micro-batches of a step, as `split_micro_batches` deals its rows by number and length."""
    known = sorted({row.number: row for row in rows}.values(), key=lambda row: row.number)
    places = {row.number: place for place, row in enumerate(known)}
    dealt = split_micro_batches([places[row.number] for row in rows], [*map(len, known)], micro_batch_size, packed)
    return [[known[place] for place in micro] for micro in dealt]


def _by_number(rows: Sequence[ComparedTexts], values: Iterable[Tensor]) -> dict[int, Tensor]:
    """What was found of each row, by its number; the mean where the step has it several times."""
    found: dict[int, list[Tensor]] = {}
    for row, value in zip(rows, values, strict=True):
        found.setdefault(row.number, []).append(value)
    return {number: torch.stack(each).mean(dim=0) for number, each in found.items()}


def same_texts(rows: Sequence[ComparedTexts]) -> Tensor:
    """bool `(rows, candidates)`: which are no negatives of a row's anchor, since they say what it says, or what
    a positive of this anchor says, here or in another row. The own positive is among them.
    """
    known: dict[bytes, int] = {}
    texts = iter([known.setdefault(key, len(known)) for key in text_keys(rows)])
    of_rows = [[next(texts) for _ in row.lengths] for row in rows]
    anchors, positives = (torch.tensor([row[place] for row in of_rows]) for place in (0, 1))
    candidates = torch.tensor([text for row in of_rows for text in row[1:]])
    near = torch.eye(len(known), dtype=torch.bool)
    near[anchors, positives] = True
    return near[anchors][:, candidates]


def contrast(anchors: Tensor, candidates: Tensor, own: Tensor, same: Tensor, scale: float) -> Tensor:
    """−log p(own positive) of each anchor, whether it is nearest, and 1 / its rank, `(3, rows)`.

    Args:
        anchors, candidates: `(rows, hidden)` and `(candidates, hidden)`, of length 1.
        own: int64 `(rows,)`, the place of each anchor's positive.
        same: bool `(rows, candidates)`, which are no negatives of an anchor; the own positive may be among them.
    """
    left_out = same.scatter(1, own[:, None], False)
    logits = (scale * anchors @ candidates.T).masked_fill(left_out, -torch.inf)  # (rows, candidates)
    losses = F.cross_entropy(logits, own, reduction="none")
    ranks = (logits.detach() >= logits.detach().gather(1, own[:, None])).sum(dim=1)
    return torch.stack([losses, (ranks == 1).to(losses.dtype), 1 / ranks.to(losses.dtype)])


def cosent(cosines: Tensor, scores: Tensor, scale: float) -> Tensor:
    """log(1 + Σ exp(scale · (cos i − cos j))) over all pairs i and j of which j has the higher score."""
    differences = scale * (cosines[:, None] - cosines[None, :])
    wrong = differences[scores[:, None] < scores[None, :]]
    return torch.cat([wrong.new_zeros(1), wrong]).logsumexp(dim=0)


def spearman(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The correlation of ranks, ties by their mean rank; 0 where one side is all alike."""
    a, b = _ranks(ours), _ranks(theirs)
    spread = a.std() * b.std()
    return float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread else 0.0


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, places, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ranks: np.ndarray = (counts.cumsum() - (counts - 1) / 2)[places]
    return ranks
