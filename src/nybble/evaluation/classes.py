"""What held-out texts say of a model that scores them: what it takes for what, or how far off its numbers are.

Precision of a class: of the texts that it was chosen for, how many are its own. Recall: of its own, how many it was
chosen for. F1 is their harmonic mean, macro F1 the mean of F1 over the classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.data.examples import EncodedExample
from nybble.data.sampler import split_micro_batches
from nybble.data.text_rows import TextRow
from nybble.evaluation.evaluation_rows import held_out_rows
from nybble.evaluation.findings import Findings, Picture, Table, check_no_answers, in_words, write_findings
from nybble.evaluation.scores import Estimate, mean_score
from nybble.events import Event, Listener, silent
from nybble.layers.precision import set_up
from nybble.layers.scored import ScoredModel
from nybble.options.verbs import EvalConfig
from nybble.pictures import picture
from nybble.runs.open_run import OpenRun, load_tuned
from nybble.sources.task import Task
from nybble.training.classify import macro_f1, target_of

MICRO_BATCH = 16  # texts computed at once
MOST_DRAWN = 30  # classes whose confusions are drawn
WRONG_SHOWN = 10


@dataclass(frozen=True)
class TextsJudged:
    """What a model makes of held-out texts.

    Args:
        task: which says what scores are of.
        scores: fp32 `(texts, labels)`.
        targets: fp64 `(texts,)`: the right class's number, or the right number.
    """

    task: Task
    scores: Tensor
    targets: Tensor

    @property
    def regression(self) -> bool:
        """Whether scores are numbers, not classes."""
        return self.task.problem == "regression"

    @property
    def confusion(self) -> np.ndarray:
        """int64 `(labels, labels)`: texts of each class (row) that each class was chosen for (column)."""
        matrix = np.zeros((len(self.task.labels),) * 2, dtype=np.int64)
        np.add.at(matrix, (self.targets.long().numpy(), self.scores.argmax(1).numpy()), 1)
        return matrix

    def loss(self) -> Estimate:
        """Mean over the texts, nats or squared error."""
        if self.regression:
            return mean_score((self.scores[:, 0].double() - self.targets).square().tolist())
        return mean_score(F.cross_entropy(self.scores.double(), self.targets.long(), reduction="none").tolist())

    def accuracy(self) -> Estimate:
        """Share of the texts whose class was chosen."""
        return mean_score((self.scores.argmax(1) == self.targets).double().tolist())

    def macro_f1(self) -> float:
        """Mean of F1 over the classes."""
        matrix = self.confusion
        return macro_f1(matrix.diagonal().tolist(), matrix.sum(0).tolist(), matrix.sum(1).tolist())

    def classes(self) -> list[dict[str, Any]]:
        """Precision, recall and F1 of each class; 0 where there is nothing to divide by."""
        matrix, found = self.confusion, []
        for number, label in enumerate(self.task.labels):
            hits, chosen, own = int(matrix[number, number]), int(matrix[:, number].sum()), int(matrix[number].sum())
            figures = {"precision": hits / max(1, chosen), "recall": hits / max(1, own)}
            found.append({"label": label, "texts": own, **figures, "f1": 2 * hits / max(1, chosen + own)})
        return found

    def figures(self) -> dict[str, str]:
        """What there is to say in numbers, in words."""
        if self.regression:
            off = self.scores[:, 0].double() - self.targets
            spread = float(torch.corrcoef(torch.stack([self.scores[:, 0].double(), self.targets]))[0, 1])
            errors = {"mean squared error": in_words(self.loss()), "mean absolute error": f"{off.abs().mean():.4f}"}
            return errors | {"correlation (Pearson)": f"{spread:.4f}"}
        commonest = float(self.confusion.sum(1).max()) / len(self.targets)
        return {
            "accuracy": in_words(self.accuracy()),
            "accuracy of the commonest class": f"{commonest:.4f}",
            "macro F1": f"{self.macro_f1():.4f}",
            "loss, nats a text": in_words(self.loss()),
        }


@dataclass(frozen=True)
class ScoresEvaluated(Event):
    """A run's scores of held-out texts have been looked at."""

    judged: TextsJudged


@torch.no_grad()
def scores_of(model: ScoredModel, rows: Sequence[EncodedExample]) -> Tensor:
    """fp32 `(texts, labels)`, on the CPU, in the order of the rows."""
    model.eval()
    texts = [row for row in rows if isinstance(row, TextRow)]
    scores = torch.zeros(len(texts), model.module.config.num_labels)
    for micro in split_micro_batches(range(len(texts)), [len(row) for row in texts], MICRO_BATCH, model.packed):
        scores[micro] = model.scores(model.collate([texts[row] for row in micro]).to(model.device)).cpu()
    return scores


def judge_texts(model: ScoredModel, rows: Sequence[EncodedExample], task: Task) -> TextsJudged:
    """What the model makes of labelled texts."""
    target = target_of(task)
    targets = [target(row.label) for row in rows if isinstance(row, TextRow)]
    return TextsJudged(task, scores_of(model, rows), torch.tensor(targets, dtype=torch.float64))


def evaluate_scores(opened: OpenRun, config: EvalConfig, report: Listener = silent) -> TextsJudged:
    """Judge a run that scores texts by its held-out rows, and write its report.

    Raises:
        ConfigError: an option is given that is for answers.
        DataError: as `held_out_rows`.
    """
    check_no_answers(opened, config)
    rows = held_out_rows(opened, config.evaluation.data, config.data.allow)
    device, dtype = set_up(config.machine)
    judged = judge_texts(ScoredModel.of(load_tuned(opened, dtype, device, report)), rows, opened.source.task)
    report(ScoresEvaluated(judged))
    write_findings(opened, _findings(opened, judged, rows), report)
    return judged


def _findings(opened: OpenRun, judged: TextsJudged, rows: Sequence[EncodedExample]) -> Findings:
    what = f"{len(judged.targets)} held-out texts"
    told: dict[str, Any] = {"rows": len(judged.targets), "loss": judged.loss().to_json()}
    if judged.regression:
        return Findings(what, judged.figures(), (), (), told)
    classes, wrong = judged.classes(), _wrong(opened, judged, rows)
    told |= {"accuracy": judged.accuracy().to_json(), "macro_f1": judged.macro_f1(), "classes": classes}
    told |= {"confusion": judged.confusion.tolist(), "wrong": wrong}
    rates = [
        (each["label"], str(each["texts"]), *(f"{each[name]:.3f}" for name in ("precision", "recall", "f1")))
        for each in classes
    ]
    mistakes = [
        (f"{each['origin']}: {each['text']}", each["label"], each["chosen"], f"{each['probability']:.3f}")
        for each in wrong
    ]
    tables = (
        Table("", ("class", "texts", "precision", "recall", "F1"), rates, on_card=True),
        Table("Texts that it is surest to be wrong about", ("text", "class", "chosen", "probability"), mistakes),
    )
    picture = Picture("Which classes are taken for which", "confusion.png", partial(draw_confusion, judged))
    return Findings(what, judged.figures(), tables, (picture,), told)


def _wrong(opened: OpenRun, judged: TextsJudged, rows: Sequence[EncodedExample]) -> list[dict[str, Any]]:
    """The texts of another class than the chosen one, surest first."""
    chosen, sure = judged.scores.argmax(1), judged.scores.softmax(1).max(1).values
    places = [int(i) for i in sure.argsort(descending=True) if chosen[i] != judged.targets[i]][:WRONG_SHOWN]
    labels, decode = judged.task.labels, opened.template.tokenizer.decode
    return [
        {
            "origin": rows[i].origin,
            "text": str(decode(rows[i].input_ids.tolist(), skip_special_tokens=True))[:200],
            "label": labels[int(judged.targets[i])],
            "chosen": labels[int(chosen[i])],
            "probability": float(sure[i]),
        }
        for i in places
    ]


def draw_confusion(judged: TextsJudged, out: Path | BinaryIO) -> None:
    """Draw which classes are taken for which: the share of each class's texts, a row a class; of many classes those
    with most texts.
    """
    matrix = judged.confusion
    shown = np.sort(np.argsort(-matrix.sum(1), kind="stable")[:MOST_DRAWN])
    part = matrix[np.ix_(shown, shown)]
    shares = part / np.maximum(1, matrix[shown].sum(1, keepdims=True))
    labels = [judged.task.labels[number] for number in shown]
    size = 2.5 + 0.45 * len(shown)
    with picture(out, "chosen", "class", (size + 1, size), fitted=True) as axes:
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(shown)), labels, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(shown)), labels)
        for row, column in zip(*np.nonzero(part), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(part[row, column]), ha="center", va="center", color=colour, fontsize=8)
