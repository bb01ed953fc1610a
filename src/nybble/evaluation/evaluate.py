"""`nybble eval`: the base in 16 bits, the base as it was trained on, and the tuned model, on the same held-out rows.

One model is in memory at a time: the 16-bit base is asked first, then the run, with its adapter off and on.
"""

import gc
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nybble.data.examples import EncodedExample
from nybble.data.preference_rows import to_follow
from nybble.data.standard_library import read_general_text
from nybble.errors import RunError
from nybble.evaluation.by_objective import ByObjective, ask_by_objective
from nybble.evaluation.classes import evaluate_scores
from nybble.evaluation.divergence import Distributions, text_logits
from nybble.evaluation.embeddings import TextsCompared, evaluate_embeddings
from nybble.evaluation.evaluation_rows import held_out_rows
from nybble.evaluation.harness import check_installed, run_tasks
from nybble.evaluation.html_report import write_html
from nybble.evaluation.judged import LabelsJudged
from nybble.evaluation.model_card import write_card
from nybble.evaluation.rewards import PairsJudged, evaluate_rewards
from nybble.evaluation.scores import METRICS, Estimate, choose_metrics, mean_loss, mean_score, row_losses
from nybble.events import Event, Listener, Note, silent
from nybble.files.disk import disk_errors
from nybble.generation.generate import generate
from nybble.layers.causal_lm import CausalLM
from nybble.layers.context import context_length
from nybble.layers.precision import set_up
from nybble.options.verbs import EvalConfig
from nybble.runs.open_run import OpenRun, load_tuned, open_run
from nybble.sources.load import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE_16, BASE_4, TUNED = "base, 16 bits", "base, as trained on", "tuned"
MICRO_BATCH = 8  # rows computed at once
ANSWER_BATCH = 8  # rows answered at once
MAX_ANSWER_TOKENS = 256
GENERAL_WINDOW, GENERAL_WINDOWS = 256, 16  # tokens of general text that are asked about at once, and how often
CHARACTERS_PER_TOKEN = 6  # more than any tokenizer needs of English prose
LENGTH_BUCKETS = 4
SHOWN_ROWS = 5
Judged = LabelsJudged | PairsJudged | TextsCompared
JUDGES: dict[str, Callable[[OpenRun, EvalConfig, Listener], Judged]] = {  # of objectives without next tokens
    "classify": evaluate_scores,
    "reward": evaluate_rewards,
    "embed": evaluate_embeddings,
}


@dataclass
class Arm:
    """What one model says.

    Args:
        losses: summed loss of each row, nats.
        kl_general: mean KL of the 16-bit base's distributions from this model's on general text, nats; 0 for it. None
            of encoder-decoders, which go on with no text.
        answers: greedy answers to the first rows.
    """

    losses: np.ndarray
    kl_general: float | None
    answers: list[str] = field(default_factory=list)


@dataclass
class Evaluation:
    """Everything that the table, the JSON file, the page and the model card show."""

    opened: OpenRun
    rows: Sequence[EncodedExample]
    texts: list[tuple[str, str]]  # (prompt, reference) of each row
    arms: dict[str, Arm]
    metrics: list[str]
    lm_eval: dict[str, Any]
    by_objective: ByObjective | None = None

    @property
    def tokens(self) -> np.ndarray:
        return np.array([row.supervised_tokens for row in self.rows])

    def loss(self, arm: str) -> Estimate:
        return mean_loss(self.arms[arm].losses, self.tokens)

    def change(self, other: str) -> Estimate:
        """The tuned model's loss minus another's, paired: the same rows at each draw (Efron 1979)."""
        return mean_loss(self.arms[TUNED].losses - self.arms[other].losses, self.tokens)

    def row_change(self) -> np.ndarray:
        """Loss a token of the tuned model minus its base's, of each row."""
        return (self.arms[TUNED].losses - self.arms[BASE_4].losses) / self.tokens

    def score(self, arm: str, metric: str) -> Estimate:
        pairs = zip(self.arms[arm].answers, self.texts, strict=False)
        return mean_score([METRICS[metric](answer, reference) for answer, (_, reference) in pairs])

    def buckets(self) -> list[dict[str, float]]:
        """Rows by length: quarters of the rows, and the loss of base and tuned in each."""
        order = np.argsort([len(row) for row in self.rows], kind="stable")
        found = []
        for part in np.array_split(order, min(LENGTH_BUCKETS, len(order))):
            lengths = [len(self.rows[i]) for i in part]
            mean = {arm: self.arms[arm].losses[part].sum() / self.tokens[part].sum() for arm in (BASE_4, TUNED)}
            found.append(
                {"rows": len(part), "shortest": min(lengths), "longest": max(lengths)}
                | {"base": float(mean[BASE_4]), "tuned": float(mean[TUNED])}
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """What `report.json` holds."""
        arms = {}
        for name, arm in self.arms.items():
            loss = self.loss(name)
            arms[name] = {
                "loss": loss.to_json(),
                "perplexity": math.exp(loss.value),
                "kl_general_text": arm.kl_general,
                "scores": {metric: self.score(name, metric).to_json() for metric in self.metrics if arm.answers},
            }
        changes = self.row_change()
        order = np.argsort(changes)
        return {
            "run": str(self.opened.run.path),
            "base": self.opened.source.name,
            "rows": len(self.rows),
            "supervised_tokens": int(self.tokens.sum()),
            "answered_rows": len(self.arms[TUNED].answers),
            "arms": arms,
            "loss_change": {name: self.change(name).to_json() for name in self.arms if name != TUNED},
            "length_buckets": self.buckets(),
            "best_rows": [self._row(i, changes[i]) for i in order[:SHOWN_ROWS]],
            "worst_rows": [self._row(i, changes[i]) for i in order[::-1][:SHOWN_ROWS]],
            "samples": [self._row(i, changes[i]) for i in range(len(self.arms[TUNED].answers))],
            "lm_eval": self.lm_eval,
        } | self._own_figures()

    def _own_figures(self) -> dict[str, Any]:
        found = self.by_objective
        if found is None:
            return {}
        return {"distillation" if found.objective == "distill" else "preferences": found.to_json()}

    def _row(self, index: int, change: float) -> dict[str, Any]:
        prompt, reference = self.texts[index]
        said = {name: arm.answers[index] for name, arm in self.arms.items() if index < len(arm.answers)}
        origin = self.rows[index].origin
        return {"origin": origin, "loss_change": float(change), "prompt": prompt, "reference": reference} | {
            "answers": said
        }


@dataclass(frozen=True)
class Evaluated(Event):
    """All three models have been asked."""

    evaluation: Evaluation


def evaluate(config: EvalConfig, report: Listener = silent) -> Evaluation | Judged:
    """Evaluate a run and write its report; of one that scores texts, what it makes of held-out ones."""
    if config.evaluation.lm_eval:
        check_installed()
    opened = open_run(config.evaluation.run, report)
    if not opened.source.task.writes:
        return JUDGES[opened.config.objective.objective](opened, config, report)
    evaluation = run_evaluation(opened, config, report)
    report(Evaluated(evaluation))
    folder = opened.run.report
    found = evaluation.to_json()
    with disk_errors(folder, RunError, "The report is not complete."):
        folder.mkdir(exist_ok=True)
        (folder / "report.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        write_html(evaluation.opened, found, evaluation.row_change(), folder / "report.html")
        write_card(evaluation.opened, found)
    for note in opened.source.notes:
        report(Note(note))
    report(Note(f"report: {folder / 'report.html'}\ncard:   {opened.trained / 'README.md'}"))
    return evaluation


def run_evaluation(opened: OpenRun, config: EvalConfig, report: Listener = silent) -> Evaluation:
    """Ask the three models."""
    asked_for = config.evaluation
    held_out = held_out_rows(opened, asked_for.data, config.data.allow)
    rows = to_follow(held_out) or held_out
    device, dtype = set_up(config.machine)
    tokenizer = opened.template.tokenizer
    texts = [(_text(tokenizer, row.prompt_ids), _text(tokenizer, row.answer_ids)) for row in rows]
    metrics = choose_metrics(asked_for.metric, [reference for _, reference in texts[: asked_for.answers]])
    windows = [] if opened.source.task.prompted else general_windows(opened)
    arms = {}

    base = load_model(opened.source, None, dtype, device, report=report)
    asked = _Asked(opened, rows, windows, asked_for.answers if metrics else 0)
    kept: list[Distributions] = []
    arms[BASE_16] = asked.ask(base, kept, first=True)
    del base
    gc.collect()  # modules refer to each other, and the next model needs the room

    model = load_tuned(opened, dtype, device, report)
    for name, enabled in ((BASE_4, False), (TUNED, True)):
        opened.switch(model, tuned=enabled)
        arms[name] = asked.ask(model, kept, first=False)
    own = ask_by_objective(opened, opened.computed_by.of(model), held_out, MICRO_BATCH, report)
    tasks = [task.strip() for task in asked_for.lm_eval.split(",")] if asked_for.lm_eval else []
    lm_eval = run_tasks(model, opened.template.tokenizer, tasks) if tasks else {}
    return Evaluation(opened, rows, texts, arms, metrics, lm_eval, own)


@dataclass(frozen=True)
class _Asked:
    """What every model is asked."""

    opened: OpenRun
    rows: Sequence[EncodedExample]
    windows: list[list[int]]
    num_answers: int

    def ask(self, model: "PreTrainedModel", kept: list[Distributions], first: bool) -> Arm:
        """One model's answers; `kept` are the 16-bit base's distributions, filled when it is asked, first."""
        causal_lm = self.opened.computed_by.of(model)
        divergences = []
        for index, window in enumerate(self.windows):
            log_p = text_logits(causal_lm, window, torch.arange(len(window))).log_softmax(dim=-1)
            if first:
                kept.append(Distributions.of(log_p))
            else:
                divergences.append(kept[index].kl(log_p).mean().item())
        return Arm(
            row_losses(causal_lm, self.rows, MICRO_BATCH),
            float(np.mean(divergences)) if divergences else None if self.opened.source.task.prompted else 0.0,
            self._answers(causal_lm),
        )

    def _answers(self, model: CausalLM) -> list[str]:
        """Greedy answers to the first rows, in batches; up to twice as long as the longest reference."""
        rows, answers = self.rows[: self.num_answers], []
        limit = min(MAX_ANSWER_TOKENS, 2 * max((len(row.answer_ids) for row in rows), default=1))
        context = context_length(model.module.config) or math.inf
        at_once = 1 if self.opened.source.task.kind == "pictured" else ANSWER_BATCH
        for start in range(0, len(rows), at_once):
            asked = rows[start : start + at_once]
            prompts = [row.prompt_ids for row in asked]
            open_prompts = [prompt for prompt in prompts if 0 < len(prompt) < context]
            stops, beside = self.opened.template.stop_ids, model.beside(asked[0].prompt)
            new = iter(generate(model.module, open_prompts, stop_ids=stops, max_new_tokens=limit, beside=beside))
            answers += [next(new) if 0 < len(prompt) < context else [] for prompt in prompts]
        return [_text(self.opened.template.tokenizer, ids) for ids in answers]


def general_windows(opened: OpenRun) -> list[list[int]]:
    """General text in windows of at most GENERAL_WINDOW tokens, and of the model's context, each from one text."""
    windows, size = [], min(GENERAL_WINDOW, context_length(opened.source.config) or GENERAL_WINDOW)
    for text in read_general_text(GENERAL_WINDOW * GENERAL_WINDOWS * CHARACTERS_PER_TOKEN):
        ids = opened.template.encoder.encode(text)
        windows += [ids[start : start + size] for start in range(0, len(ids), size)]
    return [window for window in windows if len(window) > size // 2][:GENERAL_WINDOWS]


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
