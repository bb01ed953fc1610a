"""Learning to tell texts apart, or their tokens, or to give each text a number, from rows with labels.

A class: −log of the probability that the scores give to the right one, by their softmax. Any number of classes: for
each, −log of the probability that its score gives, by the logistic function, to what is so; the mean over the classes.
Numbers: the square of what the score is off by. All as transformers computes them (`ForSequenceClassificationLoss`,
`ForTokenClassification`); the step's loss is the mean over its rows, or over its labelled tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.data.classification import LABELLED_ROWS
from nybble.data.encoded_rows import ChangedRows, EncodedRows, counted, supervised_of
from nybble.data.entities import entities_of, say_entities
from nybble.data.examples import EncodedExample
from nybble.data.labels import Classes, classes_of, form_of, learnt_labels
from nybble.data.packing import Batch
from nybble.data.picture_rows import Augment, PictureProcessor, PictureRow, collate_pictures
from nybble.data.prepare import PreparedData, RowKind
from nybble.data.text_rows import Label, TextBatch, TextRow
from nybble.errors import ConfigError, DataError
from nybble.kernels.hardware import as_double
from nybble.layers.batch_model import BatchModel
from nybble.layers.picture_model import PictureModel
from nybble.layers.scored import ScoredModel
from nybble.sources.stored_model import StoredModel
from nybble.sources.task import ARCHITECTURES, HEADS, PICTURES, SCORES, TAGS, Task
from nybble.training.objective import Part, Totals


@dataclass(frozen=True)
class Classification:
    """What all objectives over labels have in common; which of them it is, the rows say (`settled`).

    Args:
        task: with the classes, once rows have been read.
        augment: what is drawn anew of each picture that is learnt from.
        processor: makes a vision model's pixels of pictures.
    """

    task: Task = SCORES
    augment: Augment | None = None
    processor: PictureProcessor | None = None
    capturable: ClassVar[bool] = False
    kind: ClassVar[RowKind] = LABELLED_ROWS
    metrics: ClassVar[tuple[str, ...]] = ()
    of_each: ClassVar[str] = "nats a"

    @property
    def model(self) -> type[BatchModel]:
        """What computes the model from batches."""
        return PictureModel if self.task.kind == "pictures" else ScoredModel

    @property
    def unit(self) -> str:
        """Of the loss."""
        return f"{self.of_each} {'picture' if self.task.kind == 'pictures' else 'text'}"

    def settled(self, data: PreparedData, source: StoredModel, recorded: Task | None) -> "Classification":
        """As `Objective` says: with the classes that rows have, in the order of the run's record or of the model.

        Raises:
            DataError: rows have labels that the record does not know.
        """
        of_pictures = source.task.kind == "pictures"
        if self.augment is not None and not of_pictures:
            raise ConfigError(
                f"augment is {self.augment}, and the model reads texts.",
                "Parts and mirrored ones are drawn of pictures.",
                "Leave --augment out.",
            )
        classes = classes_of(data.train, data.validation)
        known = labels_of_head(source, "pictures" if of_pictures else "tags" if classes.form == "tokens" else "scores")
        task = settle_task(classes, known, PICTURES if of_pictures else SCORES)
        if recorded is not None:
            task = recorded
            for rows in (data.train, data.validation):
                check_labels(rows, task)
        processor: Any = source.load_tokenizer() if of_pictures else None
        return objective_for(task, self.augment, processor)

    def complete(self, rows: Sequence[EncodedExample], seed: int, max_seq_len: int) -> EncodedRows:
        """Each row with its class's number, or with the number to be given."""
        target_of = targets_of(self.task)

        def complete(number: int, row: EncodedExample) -> EncodedExample:
            assert isinstance(row, TextRow), row
            return replace(row, target=target_of(row))

        return ChangedRows(counted(rows), complete)

    def collate(self, rows: Sequence[EncodedExample], model: Any) -> TextBatch:
        """As `Objective` says. Of pictures, what is drawn is drawn while the model trains."""
        if self.processor is not None:
            pictures = [row for row in rows if isinstance(row, PictureRow)]
            return collate_pictures(pictures, self.processor, self.augment if model.training else None)
        batch: TextBatch = model.collate([row for row in rows if isinstance(row, TextRow)])
        return batch

    def totals(self, model: Any, rows: Sequence[EncodedExample], micro_batch_size: int) -> Totals:
        """Count the texts, or the labelled tokens."""
        return Totals(int(supervised_of(rows).sum()))

    def loss(self, model: Any, batch: Batch, totals: Totals) -> Part:
        """As `Objective` says."""
        assert isinstance(batch, TextBatch)
        scores = model.scores(batch)
        told = self.told(scores, batch) if self.metrics else None
        losses = self.losses(scores, batch)
        return Part((losses.sum() / totals.terms).float(), None if told is None else told / totals.terms)

    @torch.no_grad()
    def terms(self, model: Any, batch: Batch, totals: Totals) -> Tensor:
        """As `Objective` says: losses, and what `counts` counts."""
        assert isinstance(batch, TextBatch)
        scores = model.scores(batch)
        losses = self.losses(scores, batch)[None]
        return torch.cat([losses, self.counts(scores, batch).to(losses.dtype)])

    # ---- what they differ in

    def losses(self, scores: Tensor, batch: TextBatch) -> Tensor:
        """Of each text, or labelled token, fp64 where the device has it, `(N,)`."""
        raise NotImplementedError

    def told(self, scores: Tensor, batch: TextBatch) -> Tensor:
        """fp64 `(M,)`, sums of the metrics of steps."""
        raise NotImplementedError

    def counts(self, scores: Tensor, batch: TextBatch) -> Tensor:
        """`(K, N)`, what evaluations add up."""
        return scores.new_zeros(0, len(scores))

    def measured(self, means: Sequence[float]) -> dict[str, float]:
        """As `Objective` says."""
        return {}


@dataclass(frozen=True)
class Numbers(Classification):
    """The mean over texts of (score − number)²."""

    of_each: ClassVar[str] = "squared error a"

    def losses(self, scores: Tensor, batch: TextBatch) -> Tensor:
        """As `Classification` says."""
        return (as_double(scores[:, 0]) - batch.labels).square()


@dataclass(frozen=True)
class OneLabel(Classification):
    """The mean over texts of −log p(class)."""

    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def losses(self, scores: Tensor, batch: TextBatch) -> Tensor:
        """As `Classification` says."""
        return F.cross_entropy(as_double(scores), batch.labels.long(), reduction="none")

    def told(self, scores: Tensor, batch: TextBatch) -> Tensor:
        """Whether the right class has the highest score."""
        return as_double(scores.argmax(1) == batch.labels.long()).sum()[None]

    def counts(self, scores: Tensor, batch: TextBatch) -> Tensor:
        """Whether the right class was chosen; then of each class whether it was rightly chosen, whether it was chosen,
        and whether it is the right one.
        """
        right = (scores.argmax(1) == batch.labels.long())[None]
        chosen = F.one_hot(scores.argmax(1), scores.shape[1]).T.float()  # (labels, texts)
        true = F.one_hot(batch.labels.long(), scores.shape[1]).T.float()
        return torch.cat([right.float(), chosen * true, chosen, true])

    def measured(self, means: Sequence[float]) -> dict[str, float]:
        """As `Objective` says: accuracy, and the mean over classes of F1."""
        accuracy, *counts = means
        return {"accuracy": accuracy, "macro_f1": macro_f1(*_in_three(counts))}


@dataclass(frozen=True)
class SeveralLabels(Classification):
    """The mean over texts, and over the classes, of −log p(what is so)."""

    @property
    def unit(self) -> str:
        """Of the loss."""
        return "nats a label"

    def losses(self, scores: Tensor, batch: TextBatch) -> Tensor:
        """As `Classification` says."""
        scores = as_double(scores)
        return F.binary_cross_entropy_with_logits(scores, batch.labels.to(scores.dtype), reduction="none").mean(1)

    def counts(self, scores: Tensor, batch: TextBatch) -> Tensor:
        """Of each class whether a text was rightly given it, was given it, and has it."""
        chosen, true = (scores > 0).T.float(), batch.labels.T.float()  # (labels, texts)
        return torch.cat([chosen * true, chosen, true])

    def measured(self, means: Sequence[float]) -> dict[str, float]:
        """As `Objective` says: F1 of all labels together, and its mean over the classes."""
        hits, chosen, true = _in_three(means)
        return {"micro_f1": f1(sum(hits), sum(chosen), sum(true)), "macro_f1": macro_f1(hits, chosen, true)}


@dataclass(frozen=True)
class TokenLabels(OneLabel):
    """The mean over labelled tokens of −log p(class)."""

    @property
    def unit(self) -> str:
        """Of the loss."""
        return "nats a token"

    def counts(self, scores: Tensor, batch: TextBatch) -> Tensor:
        """Where tags say no entities, as of classes of texts. Else whether the right tag was chosen; then, at each
        text's first labelled token, its entities that were found, those that were said, and those that are there.
        """
        if not say_entities(self.task.labels):
            return super().counts(scores, batch)
        chosen, true = scores.argmax(1), batch.labels.long()
        found = torch.zeros(3, len(scores))
        place = 0
        for ours, theirs in zip(chosen.cpu().split(batch.counts), true.cpu().split(batch.counts), strict=True):
            found[:, place] = torch.tensor(count_entities(self._names(ours), self._names(theirs)))
            place += len(ours)
        return torch.cat([(chosen == true)[None].float(), found.to(scores.device)])

    def _names(self, numbers: Tensor) -> list[str]:
        return [self.task.labels[number] for number in numbers.tolist()]

    def measured(self, means: Sequence[float]) -> dict[str, float]:
        """As `Objective` says: accuracy of tokens, and F1 of entities, as the seqeval package has it; without entities
        the mean over tags of F1.
        """
        if not say_entities(self.task.labels):
            return super().measured(means)
        accuracy, *counts = means
        return {"accuracy": accuracy, "entity_f1": f1(*counts)}


def objective_for(
    task: Task, augment: Augment | None = None, processor: PictureProcessor | None = None
) -> Classification:
    """What learns a task."""
    if task.kind == "tags":
        return TokenLabels(task)
    kinds = {"regression": Numbers, "multi_label_classification": SeveralLabels}
    return kinds.get(str(task.problem), OneLabel)(task, augment, processor)


# ---- figures -------------------------------------------------------------------------------------


def count_entities(chosen: Sequence[str], true: Sequence[str]) -> tuple[int, int, int]:
    """Entities of the right kind at the right place, those that were said, and those that are there."""
    ours, theirs = set(entities_of(chosen)), set(entities_of(true))
    return len(ours & theirs), len(ours), len(theirs)


def f1(hits: float, chosen: float, true: float) -> float:
    """The harmonic mean of hits / chosen and hits / true; 0 where nothing is there."""
    return 2 * hits / (chosen + true) if chosen + true else 0.0


def macro_f1(hits: Sequence[float], chosen: Sequence[float], true: Sequence[float]) -> float:
    """The mean of F1 over the classes that are there, or were chosen."""
    parts = [f1(*each) for each in zip(hits, chosen, true, strict=True) if each[1] + each[2]]
    return sum(parts) / len(parts) if parts else 0.0


def _in_three(counts: Sequence[float]) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
    number = len(counts) // 3
    return counts[:number], counts[number : 2 * number], counts[2 * number :]


# ---- which classes -------------------------------------------------------------------------------


def labels_of_head(source: StoredModel, kind: Literal["scores", "tags", "pictures"] = "scores") -> tuple[str, ...]:
    """Names of the scores of the checkpoint's own head; none where it has none of a task's kind."""
    if not any(name.partition(".")[0] in HEADS for name in source.tensor_names()):
        return ()
    made_for = getattr(source.config, "architectures", None) or [ARCHITECTURES[kind]]
    return source.model_labels if any(name.endswith(ARCHITECTURES[kind]) for name in made_for) else ()


def settle_task(classes: Classes, known: Sequence[str], whole: Task = SCORES) -> Task:
    """The task of a model that learns these classes.

    Args:
        known: names of the scores of the model's own head; none where it has none. It is taken where the classes are
            these, or their numbers.
        whole: the task where no tokens have labels: of texts, or of pictures.
    """
    regression = classes.numbers is not None
    task = TAGS if classes.form == "tokens" else whole
    if regression:
        task = replace(task, problem="regression")
    elif classes.form == "several":
        task = replace(task, problem="multi_label_classification")
    labels = ("score",) if regression else classes.names
    numbered = tuple(str(number) for number in range(len(known)))
    if len(known) == len(labels) and (regression or set(labels) == set(known) or labels == numbered):
        return replace(task, labels=tuple(known), stored_head=True)
    return replace(task, labels=labels)


def targets_of(task: Task) -> Callable[[TextRow], float | Tensor]:
    """What scores are compared with, by the row: `TextRow.target`."""
    numbers = numbers_of(task)

    def of_row(row: TextRow) -> float | Tensor:
        if task.problem == "regression":
            return float(row.labels[0])
        if task.kind == "tags":
            return torch.tensor([float(numbers(label)) for label in row.token_labels])
        if task.problem == "multi_label_classification":
            wanted = torch.zeros(1, len(task.labels))
            wanted[0, [numbers(label) for label in row.labels]] = 1
            return wanted
        return float(numbers(row.labels[0]))

    return of_row


def numbers_of(task: Task) -> Callable[[Label], int]:
    """The number of a class by its label: by its name, or by its number among the model's names."""
    places = {str(number): number for number in range(len(task.labels))}
    places |= {name: place for place, name in enumerate(task.labels)}
    return lambda label: places[str(label)]


def check_labels(rows: Sequence[EncodedExample], task: Task) -> None:
    """Refuse rows that are labelled otherwise than a task's.

    Raises:
        DataError: names the first label that it does not know, and counts the rows.
    """
    form = "tokens" if task.kind == "tags" else "several" if task.problem == "multi_label_classification" else "one"
    known = {*task.labels, *map(str, range(len(task.labels)))}

    def strange(row: TextRow) -> str | None:
        if form_of(row) != form:
            return "labels of another form"
        labels = learnt_labels(row)
        if task.problem == "regression":
            return next((repr(label) for label in labels if isinstance(label, str)), None)
        return next((repr(label) for label in labels if str(label) not in known), None)

    first, count = ("", ""), 0
    for row in rows:
        if isinstance(row, TextRow) and (said := strange(row)) is not None:
            first, count = first if count else (row.origin, said), count + 1
    if count:
        raise DataError(
            f"{first[0]}: {first[1]}, which the run does not know ({count} {'row' if count == 1 else 'rows'})",
            f"its labels: {', '.join(task.labels[:20])}",
            "give rows with these labels, or train anew",
        )
