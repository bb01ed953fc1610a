"""Learning to tell texts apart, or to give each a number, from rows with labels.

Classes: −log of the probability that the model's scores give to the right one, by their softmax; numbers: the square of
what the score is off by. As transformers computes both (`ForSequenceClassificationLoss`); the step's loss is the mean
over its rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.data.classification import LABELLED_ROWS, Classes, classes_of
from nybble.data.encoded_rows import ChangedRows, EncodedRows, counted
from nybble.data.examples import EncodedExample
from nybble.data.packing import Batch
from nybble.data.prepare import PreparedData, RowKind
from nybble.data.text_rows import Label, TextBatch, TextRow
from nybble.kernels.hardware import as_double
from nybble.layers.batch_model import BatchModel
from nybble.layers.scored import ScoredModel
from nybble.sources.stored_model import StoredModel
from nybble.sources.task import HEADS, SCORES, Problem, Task
from nybble.training.objective import Part, Totals


@dataclass(frozen=True)
class Classification:
    """The mean over texts of −log p(class), or of (score − number)²; the task says which.

    Args:
        task: with the classes, once rows have been read.
    """

    task: Task = SCORES
    capturable: ClassVar[bool] = False
    model: ClassVar[type[BatchModel]] = ScoredModel
    kind: ClassVar[RowKind] = LABELLED_ROWS

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what is told of a step."""
        return () if self.is_regression else ("accuracy",)

    @property
    def unit(self) -> str:
        """Of the loss."""
        return "squared error a text" if self.is_regression else "nats a text"

    @property
    def is_regression(self) -> bool:
        """Whether a number is learnt."""
        return self.task.problem == "regression"

    def settled(self, data: PreparedData, source: StoredModel, recorded: Task | None) -> "Classification":
        """As `Objective` says: with the classes that rows have, in the order of the run's record or of the model."""
        if recorded is not None:
            return replace(self, task=recorded)
        return replace(self, task=settle_task(classes_of(data.train, data.validation), labels_of_head(source)))

    def complete(self, rows: Sequence[EncodedExample], seed: int, max_seq_len: int) -> EncodedRows:
        """Each row with its class's number, or with the number to be given."""
        number_of = target_of(self.task)

        def complete(number: int, row: EncodedExample) -> EncodedExample:
            assert isinstance(row, TextRow), row
            return replace(row, target=number_of(row.label))

        return ChangedRows(counted(rows), complete)

    def collate(self, rows: Sequence[EncodedExample], model: Any) -> TextBatch:
        """As `Objective` says."""
        batch: TextBatch = model.collate([row for row in rows if isinstance(row, TextRow)])
        return batch

    def totals(self, model: Any, rows: Sequence[EncodedExample], micro_batch_size: int) -> Totals:
        """Count the texts."""
        return Totals(len(rows))

    def loss(self, model: Any, batch: Batch, totals: Totals) -> Part:
        """As `Objective` says."""
        assert isinstance(batch, TextBatch)
        scores = model.scores(batch)
        losses, right = self._judged(scores, batch)
        told = None if self.is_regression else as_double(right).sum()[None] / totals.terms
        return Part((losses.sum() / totals.terms).float(), told)

    @torch.no_grad()
    def terms(self, model: Any, batch: Batch, totals: Totals) -> Tensor:
        """As `Objective` says. Of classes: whether the right one was chosen; then of each class whether it was rightly
        chosen, whether it was chosen, and whether it is the right one.
        """
        assert isinstance(batch, TextBatch)
        scores = model.scores(batch)
        losses, right = self._judged(scores, batch)
        if self.is_regression:
            return losses[None]
        chosen = F.one_hot(scores.argmax(1), scores.shape[1]).T.float()  # (labels, texts)
        true = F.one_hot(batch.labels.long(), scores.shape[1]).T.float()
        return torch.cat([losses[None], right[None].to(losses.dtype), chosen * true, chosen, true])

    def measured(self, means: Sequence[float]) -> dict[str, float]:
        """As `Objective` says: accuracy, and the mean over classes of F1."""
        if self.is_regression:
            return {}
        accuracy, *counts = means
        number = len(counts) // 3
        hits, chosen, true = counts[:number], counts[number : 2 * number], counts[2 * number :]
        return {"accuracy": accuracy, "macro_f1": macro_f1(hits, chosen, true)}

    def _judged(self, scores: Tensor, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """Losses, fp64 where the device has it, `(texts,)`, and whether the right class has the highest score."""
        if self.is_regression:
            losses = (as_double(scores[:, 0]) - batch.labels).square()
            return losses, torch.zeros_like(losses)
        classes = batch.labels.long()
        return F.cross_entropy(as_double(scores), classes, reduction="none"), scores.argmax(1) == classes


def macro_f1(hits: Sequence[float], chosen: Sequence[float], true: Sequence[float]) -> float:
    """The mean over the classes that are there, or were chosen, of 2 · hits / (chosen + true)."""
    parts = [2 * hit / (c + t) for hit, c, t in zip(hits, chosen, true, strict=True) if c + t]
    return sum(parts) / len(parts) if parts else 0.0


def labels_of_head(source: StoredModel) -> tuple[str, ...]:
    """Names of the scores of the checkpoint's own head; none where it has no head."""
    has_head = any(name.partition(".")[0] in HEADS for name in source.tensor_names())
    return source.model_labels if has_head else ()


def settle_task(classes: Classes, known: Sequence[str]) -> Task:
    """The task of a model that learns these classes.

    Args:
        known: names of the scores of the model's own head; none where it has none. It is taken where the classes are
            these, or their numbers.
    """
    regression = classes.numbers is not None
    problem: Problem = "regression" if regression else "single_label_classification"
    labels = ("score",) if regression else classes.names
    numbered = tuple(str(number) for number in range(len(known)))
    if len(known) == len(labels) and (regression or set(labels) == set(known) or labels == numbered):
        return replace(SCORES, labels=tuple(known), problem=problem, stored_head=True)
    return replace(SCORES, labels=labels, problem=problem)


def target_of(task: Task) -> Callable[[Label], float]:
    """What scores are compared with, by the label."""
    if task.problem == "regression":
        return float
    places = {name: float(place) for place, name in enumerate(task.labels)}
    return lambda label: places[str(label)] if str(label) in places else float(label)  # numbers of the model's names
