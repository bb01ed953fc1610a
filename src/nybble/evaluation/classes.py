"""What held-out texts say of a model that scores them: what it takes for what, or how far off its numbers are.

Precision of a class: of the texts that it was chosen for, how many are its own. Recall: of its own, how many it was
chosen for. F1 is their harmonic mean, macro F1 the mean of F1 over the classes.
"""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from jinja2 import Environment
from torch import Tensor

from nybble.data.examples import EncodedExample
from nybble.data.sampler import split_micro_batches
from nybble.data.text_rows import TextRow
from nybble.errors import ConfigError, RunError
from nybble.evaluation.evaluation_rows import held_out_rows
from nybble.evaluation.model_card import card_head
from nybble.evaluation.scores import Estimate, mean_score
from nybble.events import Event, Listener, Note, silent
from nybble.files.disk import disk_errors
from nybble.layers.precision import set_up
from nybble.layers.scored import ScoredModel
from nybble.options.verbs import EvalConfig
from nybble.pictures import picture
from nybble.runs.open_run import OpenRun, load_tuned
from nybble.sources.task import Task
from nybble.training.classify import macro_f1, target_of
from nybble.training.plots import draw_loss

MICRO_BATCH = 16  # texts computed at once
MOST_DRAWN = 30  # classes whose confusions are drawn
WRONG_SHOWN = 10
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ report.run }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { border: 1px solid #ccc; padding: .3rem .6rem; }
td { text-align: right } td:first-child { text-align: left } img { max-width: 100% }
</style></head><body>
<h1>{{ report.run }}</h1>
<p>Base: {{ report.base }}. {{ report.rows }} held-out texts. In brackets: 95 % confidence intervals, texts drawn again
2000 times.</p>
<table>{% for name, value in report.figures.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}
</table>
{% if report.classes %}<table><tr><th>class</th><th>texts</th><th>precision</th><th>recall</th><th>F1</th></tr>
{% for each in report.classes %}<tr><td>{{ each.label }}</td><td>{{ each.texts }}</td>
<td>{{ '%.3f' % each.precision }}</td><td>{{ '%.3f' % each.recall }}</td><td>{{ '%.3f' % each.f1 }}</td></tr>
{% endfor %}</table>{% endif %}
{% for title, picture in pictures.items() %}<h2>{{ title }}</h2>
<img alt="{{ title }}" src="data:image/png;base64,{{ picture }}">{% endfor %}
{% if report.wrong %}<h2>Texts that it is surest to be wrong about</h2>
<table><tr><th>text</th><th>class</th><th>chosen</th><th>probability</th></tr>
{% for each in report.wrong %}<tr><td>{{ each.origin }}: {{ each.text }}</td><td>{{ each.label }}</td>
<td>{{ each.chosen }}</td><td>{{ '%.3f' % each.probability }}</td></tr>{% endfor %}</table>{% endif %}
</body></html>
"""


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
            errors = {"mean squared error": _interval(self.loss()), "mean absolute error": f"{off.abs().mean():.4f}"}
            return errors | {"correlation (Pearson)": f"{spread:.4f}"}
        commonest = float(self.confusion.sum(1).max()) / len(self.targets)
        return {
            "accuracy": _interval(self.accuracy()),
            "accuracy of the commonest class": f"{commonest:.4f}",
            "macro F1": f"{self.macro_f1():.4f}",
            "loss, nats a text": _interval(self.loss()),
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
    if unused := sorted(config.evaluation.model_fields_set & {"metric", "answers", "lm_eval"}):
        raise ConfigError(
            f"{unused[0].replace('_', '-')} is given, and the run is {opened.source.task.words}.",
            "It is for answers of language models.",
            f"Leave --{unused[0].replace('_', '-')} out.",
        )
    rows = held_out_rows(opened, config.evaluation.data, config.data.allow)
    device, dtype = set_up(config.machine)
    judged = judge_texts(ScoredModel.of(load_tuned(opened, dtype, device, report)), rows, opened.source.task)
    report(ScoresEvaluated(judged))
    found, folder = _to_json(opened, judged, rows), opened.run.report
    with disk_errors(folder, RunError, "The report is not complete."):
        folder.mkdir(exist_ok=True)
        (folder / "report.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        if not judged.regression:
            draw_confusion(judged, folder / "confusion.png")
        _write_html(opened, judged, found, folder / "report.html")
        _write_card(opened, found)
    report(Note(f"report: {folder / 'report.html'}\ncard:   {opened.run.adapter / 'README.md'}"))
    return judged


def _to_json(opened: OpenRun, judged: TextsJudged, rows: Sequence[EncodedExample]) -> dict[str, Any]:
    found: dict[str, Any] = {"run": str(opened.run.path), "base": opened.source.name, "rows": len(judged.targets)}
    found |= {"loss": judged.loss().to_json(), "figures": judged.figures()}
    if judged.regression:
        return found
    more = {"accuracy": judged.accuracy().to_json(), "macro_f1": judged.macro_f1(), "classes": judged.classes()}
    return found | more | {"confusion": judged.confusion.tolist(), "wrong": _wrong(opened, judged, rows)}


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


def _write_html(opened: OpenRun, judged: TextsJudged, report: dict[str, Any], out: Path) -> None:
    pictures = {}
    if not judged.regression:
        pictures["Which classes are taken for which"] = _encoded(lambda file: draw_confusion(judged, file))
    if opened.run.events.is_file():
        pictures["Losses of the run"] = _encoded(lambda file: draw_loss(opened.run.events, file))
    page = Environment(autoescape=True).from_string(PAGE)
    out.write_text(page.render(report=report, pictures=pictures), encoding="utf-8")


def _encoded(draw: Any) -> str:
    out = io.BytesIO()
    draw(out)
    return base64.b64encode(out.getvalue()).decode()


def _write_card(opened: OpenRun, report: dict[str, Any]) -> None:
    """The adapter's README.md."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in report["figures"].items())
    lines = [f"{report['rows']} held-out texts.", "", "| | |", "|---|---|", rows]
    if classes := report.get("classes"):
        lines += ["", "| class | texts | precision | recall | F1 |", "|---|---|---|---|---|"]
        for each in classes:
            rates = " | ".join(f"{each[name]:.3f}" for name in ("precision", "recall", "f1"))
            lines.append(f"| {each['label']} | {each['texts']} | {rates} |")
    text = card_head(opened) + "## Results\n\n" + "\n".join(lines) + "\n"
    (opened.run.adapter / "README.md").write_text(text, encoding="utf-8")


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"
