"""What held-out texts say of a model that scores them, or their tokens: figures, plain numbers in, numbers out.

Precision of a class: of what it was chosen for, how much is its own. Recall: of its own, how much it was chosen for. F1
is their harmonic mean; micro F1 that of all classes together, macro F1 the mean over the classes. Entities are right
where kind, beginning and end are, as conlleval and the seqeval package count them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.data.entities import Entity, entities_of, say_entities
from nybble.evaluation.findings import in_words
from nybble.evaluation.scores import Estimate, mean_loss, mean_score, of_rows
from nybble.sources.task import Task
from nybble.training.classify import f1, macro_f1


class Mistake(NamedTuple):
    """Something that was taken for something else.

    Args:
        text, place: which text; and which of what is scored of it.
        label, chosen: what is so, and what was said.
        probability: that the model gave to what it said.
    """

    text: int
    place: int
    label: str
    chosen: str
    probability: float


@dataclass(frozen=True)
class LabelsJudged(ABC):
    """What a model makes of held-out texts.

    Args:
        task: which says what scores are of.
        scores: fp32 `(N, labels)`, of each text, or of each of its labelled tokens.
        targets: fp64, as `TextBatch.labels` has them: the right class's number, or the right number, `(N,)`; 1 for each
            class that a text has, `(N, labels)`.
        counts: of the N, how many are each text's.
    """

    task: Task
    scores: Tensor
    targets: Tensor
    counts: tuple[int, ...]

    @property
    def unit(self) -> str:
        """Of what `classes` counts."""
        return "pictures" if self.task.kind == "pictures" else "texts"

    @property
    def texts(self) -> int:
        """How many there are."""
        return len(self.counts)

    @abstractmethod
    def loss(self) -> Estimate:
        """Mean over the texts, or over all labelled tokens."""

    @abstractmethod
    def figures(self) -> dict[str, str]:
        """What there is to say in numbers, in words."""

    def measures(self) -> dict[str, Any]:
        """Figures for a report in JSON."""
        return {}

    def classes(self) -> list[dict[str, Any]]:
        """Precision, recall and F1 of each class; 0 where there is nothing to divide by."""
        return []

    @property
    def confusion(self) -> np.ndarray | None:
        """int64 `(labels, labels)`: what is of each class (row) that each class was chosen for (column); None where a
        text has several, or numbers are learnt.
        """
        return None

    def mistakes(self) -> Iterator[Mistake]:
        """What was taken for something else, surest first."""
        return iter(())

    def _text_of(self, number: int) -> tuple[int, int]:
        """Which text a score is of, and its place among that text's."""
        ends = np.cumsum(self.counts)
        text = int(np.searchsorted(ends, number, side="right"))
        return text, number - int(ends[text] - self.counts[text])


@dataclass(frozen=True)
class NumbersJudged(LabelsJudged):
    """Of texts that are given a number."""

    def loss(self) -> Estimate:
        """Mean squared error."""
        return mean_score((self.scores[:, 0].double() - self.targets).square().tolist())

    def figures(self) -> dict[str, str]:
        """As `LabelsJudged` says."""
        off = self.scores[:, 0].double() - self.targets
        spread = float(torch.corrcoef(torch.stack([self.scores[:, 0].double(), self.targets]))[0, 1])
        errors = {"mean squared error": in_words(self.loss()), "mean absolute error": f"{off.abs().mean():.4f}"}
        return errors | {"correlation (Pearson)": f"{spread:.4f}"}


@dataclass(frozen=True)
class ClassesJudged(LabelsJudged):
    """Of texts that have a class each."""

    @property
    def confusion(self) -> np.ndarray:
        """As `LabelsJudged` says."""
        matrix = np.zeros((len(self.task.labels),) * 2, dtype=np.int64)
        np.add.at(matrix, (self.targets.long().numpy(), self.scores.argmax(1).numpy()), 1)
        return matrix

    def loss(self) -> Estimate:
        """Mean over the texts, nats."""
        return mean_score(F.cross_entropy(self.scores.double(), self.targets.long(), reduction="none").tolist())

    def accuracy(self) -> Estimate:
        """Share of the texts whose class was chosen."""
        return mean_score(self._right().tolist())

    def macro_f1(self) -> float:
        """Mean of F1 over the classes."""
        matrix = self.confusion
        return macro_f1(matrix.diagonal().tolist(), matrix.sum(0).tolist(), matrix.sum(1).tolist())

    def classes(self) -> list[dict[str, Any]]:
        """As `LabelsJudged` says."""
        matrix = self.confusion
        counts = zip(self.task.labels, matrix.diagonal(), matrix.sum(0), matrix.sum(1), strict=True)
        return [_rates(label, self.unit, *map(int, each)) for label, *each in counts]

    def measures(self) -> dict[str, Any]:
        """As `LabelsJudged` says."""
        return {"accuracy": self.accuracy().to_json(), "macro_f1": self.macro_f1()}

    def figures(self) -> dict[str, str]:
        """As `LabelsJudged` says."""
        of_pictures = self.task.kind == "pictures"
        return {
            "accuracy (top-1)" if of_pictures else "accuracy": in_words(self.accuracy()),
            "accuracy of the commonest class": f"{self._commonest():.4f}",
            "macro F1": f"{self.macro_f1():.4f}",
            f"loss, nats a {'picture' if of_pictures else 'text'}": in_words(self.loss()),
        }

    def mistakes(self) -> Iterator[Mistake]:
        """As `LabelsJudged` says."""
        chosen, sure = self.scores.argmax(1), self.scores.softmax(1).max(1).values
        for number in sure.argsort(descending=True).tolist():
            if chosen[number] != self.targets[number]:
                names = self.task.labels[int(self.targets[number])], self.task.labels[int(chosen[number])]
                yield Mistake(*self._text_of(number), *names, float(sure[number]))

    def _right(self) -> Tensor:
        return (self.scores.argmax(1) == self.targets).double()

    def _commonest(self) -> float:
        return float(self.confusion.sum(1).max()) / len(self.targets)


@dataclass(frozen=True)
class SeveralJudged(LabelsJudged):
    """Of texts that have any number of classes: those whose score is above 0."""

    def loss(self) -> Estimate:
        """Mean over the texts and the labels, nats."""
        losses = F.binary_cross_entropy_with_logits(self.scores.double(), self.targets, reduction="none")
        return mean_score(losses.mean(1).tolist())

    def classes(self) -> list[dict[str, Any]]:
        """As `LabelsJudged` says."""
        counts = zip(self.task.labels, *self._counts(), strict=True)
        return [_rates(label, self.unit, *map(int, each)) for label, *each in counts]

    def measures(self) -> dict[str, Any]:
        """As `LabelsJudged` says."""
        return {"micro_f1": self.micro_f1().to_json(), "macro_f1": macro_f1(*self._counts())}

    def micro_f1(self) -> Estimate:
        """F1 of all labels together; texts are drawn again for the interval."""
        chosen, true = self._chosen(), self.targets.numpy()
        parts = ((chosen * true).sum(1), chosen.sum(1), true.sum(1))
        return of_rows(lambda rows: _f1(*(part[rows].sum(-1) for part in parts)), len(true))

    def figures(self) -> dict[str, str]:
        """As `LabelsJudged` says."""
        exact = (self._chosen() == self.targets.numpy()).all(1)
        return {
            "micro F1": in_words(self.micro_f1()),
            "macro F1": f"{macro_f1(*self._counts()):.4f}",
            "all labels of a text right": in_words(mean_score(exact.astype(float).tolist())),
            "loss, nats a label": in_words(self.loss()),
        }

    def mistakes(self) -> Iterator[Mistake]:
        """As `LabelsJudged` says."""
        labels = self.task.labels
        for number in self.scores.abs().flatten().argsort(descending=True).tolist():
            text, label = divmod(number, len(labels))
            score, true = float(self.scores[text, label]), bool(self.targets[text, label])
            if (score > 0) != true:
                names = (labels[label], f"not {labels[label]}")
                yield Mistake(text, 0, names[not true], names[true], float(torch.tensor(abs(score)).sigmoid()))

    def _chosen(self) -> np.ndarray:
        return (self.scores > 0).double().numpy()

    def _counts(self) -> tuple[list[float], list[float], list[float]]:
        chosen, true = self._chosen(), self.targets.numpy()
        return (chosen * true).sum(0).tolist(), chosen.sum(0).tolist(), true.sum(0).tolist()


@dataclass(frozen=True)
class TokensJudged(ClassesJudged):
    """Of tokens that have a class each."""

    @property
    def unit(self) -> str:
        """As `LabelsJudged` says."""
        return "tokens"

    def loss(self) -> Estimate:
        """Mean over all labelled tokens, nats; texts are drawn again for the interval."""
        losses = F.cross_entropy(self.scores.double(), self.targets.long(), reduction="none")
        return mean_loss(self._sums(losses), np.array(self.counts))

    def accuracy(self) -> Estimate:
        """Share of the tokens whose class was chosen."""
        return mean_loss(self._sums(self._right()), np.array(self.counts))

    def figures(self) -> dict[str, str]:
        """As `LabelsJudged` says."""
        return {
            "accuracy of tokens": in_words(self.accuracy()),
            "accuracy of the commonest class": f"{self._commonest():.4f}",
            "macro F1": f"{self.macro_f1():.4f}",
            "loss, nats a token": in_words(self.loss()),
        }

    def _sums(self, values: Tensor) -> np.ndarray:
        """Over each text's tokens."""
        return np.array([part.sum().item() for part in values.split(self.counts)])


@dataclass(frozen=True)
class EntitiesJudged(TokensJudged):
    """Of tokens whose classes say where entities are."""

    @property
    def unit(self) -> str:
        """As `LabelsJudged` says."""
        return "entities"

    @cached_property
    def found(self) -> list[tuple[set[Entity], set[Entity]]]:
        """Of each text the entities that were said, and those that are there."""
        both = (self.scores.argmax(1).split(self.counts), self.targets.long().split(self.counts))
        return [(self._entities(ours), self._entities(theirs)) for ours, theirs in zip(*both, strict=True)]

    def _entities(self, numbers: Tensor) -> set[Entity]:
        return set(entities_of([self.task.labels[number] for number in numbers.tolist()]))

    def entity_f1(self) -> Estimate:
        """Of all entities together; texts are drawn again for the interval."""
        counts = np.array([(len(ours & theirs), len(ours), len(theirs)) for ours, theirs in self.found])
        return of_rows(lambda rows: _f1(*np.moveaxis(counts[rows].sum(-2), -1, 0)), len(counts))

    def classes(self) -> list[dict[str, Any]]:
        """Of each kind of entity."""
        kinds = sorted({entity.kind for both in self.found for entities in both for entity in entities})
        return [_rates(kind, self.unit, *self._counts(kind)) for kind in kinds]

    def measures(self) -> dict[str, Any]:
        """As `LabelsJudged` says."""
        return {"accuracy": self.accuracy().to_json(), "entity_f1": self.entity_f1().to_json()}

    def figures(self) -> dict[str, str]:
        """As `LabelsJudged` says."""
        hits, chosen, true = self._counts()
        return {
            "F1 of entities": in_words(self.entity_f1()),
            "their precision": f"{hits / max(1, chosen):.4f}",
            "their recall": f"{hits / max(1, true):.4f}",
            "accuracy of tokens": in_words(self.accuracy()),
            "loss, nats a token": in_words(self.loss()),
        }

    def _counts(self, kind: str | None = None) -> tuple[int, int, int]:
        """Entities that were rightly said, said, and there; of one kind, or of all."""
        own = [[{e for e in entities if kind in (None, e.kind)} for entities in both] for both in self.found]
        hits = sum(len(ours & theirs) for ours, theirs in own)
        return hits, sum(len(ours) for ours, _ in own), sum(len(theirs) for _, theirs in own)


def judged(task: Task, scores: Sequence[Tensor], targets: Sequence[Tensor]) -> LabelsJudged:
    """What a model makes of texts, by what it learnt.

    Args:
        scores, targets: of each text, as `LabelsJudged` has them.
    """
    kind: type[LabelsJudged] = ClassesJudged
    if task.kind == "tags":
        kind = EntitiesJudged if say_entities(task.labels) else TokensJudged
    elif task.problem == "regression":
        kind = NumbersJudged
    elif task.problem == "multi_label_classification":
        kind = SeveralJudged
    return kind(task, torch.cat(list(scores)), torch.cat(list(targets)).double(), tuple(map(len, scores)))


def _rates(label: str, unit: str, hits: int, chosen: int, own: int) -> dict[str, Any]:
    figures = {"precision": hits / max(1, chosen), "recall": hits / max(1, own)}
    return {"label": label, unit: own, **figures, "f1": f1(hits, chosen, own)}


def _f1(hits: np.ndarray, chosen: np.ndarray, true: np.ndarray) -> np.ndarray:
    return 2 * hits / np.maximum(1, chosen + true)
