"""The report of a run that scores texts, or their tokens: what it takes for what, or how far off its numbers are."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from nybble.data.examples import EncodedExample
from nybble.data.picture_rows import PictureProcessor, PictureRow
from nybble.data.sampler import split_micro_batches
from nybble.data.text_rows import TextRow
from nybble.evaluation.evaluation_rows import held_out_rows
from nybble.evaluation.findings import Findings, Picture, Table, check_no_answers, write_findings
from nybble.evaluation.judged import LabelsJudged, Mistake, judged
from nybble.events import Event, Listener, silent
from nybble.layers.picture_model import PictureModel
from nybble.layers.precision import set_up
from nybble.layers.scored import ScoredModel
from nybble.options.verbs import EvalConfig
from nybble.pictures import picture
from nybble.runs.open_run import OpenRun, load_tuned
from nybble.sources.task import Task
from nybble.training.classify import check_labels, targets_of

MICRO_BATCH = 16  # texts computed at once
MOST_DRAWN = 30  # classes whose confusions are drawn
WRONG_SHOWN, LETTERS_SHOWN, TOKENS_BEFORE = 10, 200, 16


@dataclass(frozen=True)
class ScoresEvaluated(Event):
    """A run's scores of held-out texts have been looked at."""

    judged: LabelsJudged


def scored_model(opened: OpenRun, module: Any) -> ScoredModel:
    """A run's loaded model, which takes rows of its kind."""
    if opened.source.task.kind != "pictures":
        return ScoredModel.of(module)
    model = PictureModel.of(module)
    model.processor = picture_processor(opened)
    return model


def picture_processor(opened: OpenRun) -> PictureProcessor:
    """That of a run's vision model."""
    found: Any = opened.template.tokenizer
    assert isinstance(found, PictureProcessor)
    return found


@torch.no_grad()
def scores_of(model: ScoredModel, rows: Sequence[EncodedExample]) -> list[Tensor]:
    """Of each text, in the order of the rows: fp32 `(1, labels)`, or `(labelled tokens, labels)`, on the CPU."""
    model.eval()
    texts = [row for row in rows if isinstance(row, TextRow)]
    scores: dict[int, Tensor] = {}
    for micro in split_micro_batches(range(len(texts)), [len(row) for row in texts], MICRO_BATCH, model.packed):
        batch = model.collate([texts[row] for row in micro])
        found = model.scores(batch.to(model.device)).cpu().split(batch.counts)
        scores |= dict(zip(micro, found, strict=True))
    return [scores[number] for number in range(len(texts))]


def judge_texts(model: ScoredModel, rows: Sequence[EncodedExample], task: Task) -> LabelsJudged:
    """What the model makes of labelled texts.

    Raises:
        DataError: rows have labels that the task does not know.
    """
    check_labels(rows, task)
    target_of = targets_of(task)
    targets = [torch.as_tensor(target_of(row)) for row in rows if isinstance(row, TextRow)]
    whole = [target if target.ndim else target[None] for target in targets]
    return judged(task, scores_of(model, rows), whole)


def evaluate_scores(opened: OpenRun, config: EvalConfig, report: Listener = silent) -> LabelsJudged:
    """Judge a run that scores texts by its held-out rows, and write its report.

    Raises:
        ConfigError: an option is given that is for answers.
        DataError: as `held_out_rows`.
    """
    check_no_answers(opened, config)
    rows = held_out_rows(opened, config.evaluation.data, config.data.allow)
    device, dtype = set_up(config.machine)
    seen = judge_texts(scored_model(opened, load_tuned(opened, dtype, device, report)), rows, opened.source.task)
    report(ScoresEvaluated(seen))
    write_findings(opened, _findings(opened, seen, rows), report)
    return seen


def _findings(opened: OpenRun, seen: LabelsJudged, rows: Sequence[EncodedExample]) -> Findings:
    what = f"{seen.texts} held-out {'pictures' if seen.task.kind == 'pictures' else 'texts'}"
    told: dict[str, Any] = {"rows": seen.texts, "loss": seen.loss().to_json()}
    if not (classes := seen.classes()):
        return Findings(what, seen.figures(), (), (), told)
    wrong = [_shown(mistake, rows[mistake.text], opened) for mistake in islice(seen.mistakes(), WRONG_SHOWN)]
    told |= seen.measures() | {"classes": classes, "wrong": wrong}
    rates = [
        (each["label"], str(each[seen.unit]), *(f"{each[name]:.3f}" for name in ("precision", "recall", "f1")))
        for each in classes
    ]
    mistakes = [
        (
            ": ".join(filter(None, (each["origin"], each["text"]))),
            each["label"],
            each["chosen"],
            f"{each['probability']:.3f}",
        )
        for each in wrong
    ]
    tables = (
        Table("", ("class", seen.unit, "precision", "recall", "F1"), rates, on_card=True),
        Table("What it is surest to be wrong about", ("text", "class", "chosen", "probability"), mistakes),
    )
    pictures = []
    if (matrix := seen.confusion) is not None:
        told["confusion"] = matrix.tolist()
        draw = partial(draw_confusion, matrix, seen.task.labels)
        pictures.append(Picture("Which classes are taken for which", "confusion.png", draw))
    return Findings(what, seen.figures(), tables, pictures, told)


def _shown(mistake: Mistake, row: EncodedExample, opened: OpenRun) -> dict[str, Any]:
    """A mistake, with the text; of a token what stands before it, too."""
    assert isinstance(row, TextRow)
    if isinstance(row, PictureRow):
        return {"origin": row.origin, "text": "", **_told(mistake)}
    decode, ids = opened.template.tokenizer.decode, row.input_ids.tolist()
    if row.units is not None:
        place = int(row.places[mistake.place])
        before = str(decode(ids[max(0, place - TOKENS_BEFORE) : place], skip_special_tokens=True))
        text = f"{before[-LETTERS_SHOWN:]} [{str(decode(ids[place : place + 1])).strip()}]"
    else:
        text = str(decode(ids, skip_special_tokens=True))[:LETTERS_SHOWN]
    return {"origin": row.origin, "text": text, **_told(mistake)}


def _told(mistake: Mistake) -> dict[str, Any]:
    return {"label": mistake.label, "chosen": mistake.chosen, "probability": mistake.probability}


def draw_confusion(matrix: np.ndarray, labels: Sequence[str], out: Path | BinaryIO) -> None:
    """Draw which classes are taken for which: the share of each class, a row a class; of many classes the commonest."""
    shown = np.sort(np.argsort(-matrix.sum(1), kind="stable")[:MOST_DRAWN])
    part = matrix[np.ix_(shown, shown)]
    shares = part / np.maximum(1, matrix[shown].sum(1, keepdims=True))
    names = [labels[number] for number in shown]
    size = 2.5 + 0.45 * len(shown)
    with picture(out, "chosen", "class", (size + 1, size), fitted=True) as axes:
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(shown)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(shown)), names)
        for row, column in zip(*np.nonzero(part), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(part[row, column]), ha="center", va="center", color=colour, fontsize=8)
