"""What held-out texts say of a model that embeds them, and of its base: how often the text that belongs to another is
the nearest of all to it; of pairs with scores, how alike the orders of cosines and scores are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from nybble.data.embedding_rows import ComparedTexts, compared_of, has_scores
from nybble.data.examples import EncodedExample
from nybble.data.sampler import split_micro_batches
from nybble.data.text_rows import TextRow, texts_of
from nybble.evaluation.evaluation_rows import held_out_rows
from nybble.evaluation.findings import Findings, Picture, Table, check_no_answers, in_words, write_findings
from nybble.evaluation.scores import Estimate, mean_score, of_rows
from nybble.events import Event, Listener, silent
from nybble.layers.embedded import EmbeddedModel
from nybble.layers.precision import set_up
from nybble.options.objective_groups import Pooling
from nybble.options.verbs import EvalConfig
from nybble.pictures import picture
from nybble.runs.open_run import OpenRun, load_tuned
from nybble.training.embed import Embedding, spearman
from nybble.training.objectives import make_objective

MICRO_BATCH = 32  # texts computed at once
NEAR = 10  # of the nearest texts, among which the right one is looked for
WRONG_SHOWN, CHARACTERS_SHOWN = 10, 200


@dataclass(frozen=True)
class Neighbours:
    """What one model makes of rows of texts.

    Args:
        terms: fp64 `(1 + M, rows)`, loss and metrics of each, among all of them.
        cosines: fp64 `(rows,)`, of each anchor and its positive.
        scores: fp64 `(rows,)`; None where pairs have none.
    """

    terms: np.ndarray
    cosines: np.ndarray
    scores: np.ndarray | None

    def figures(self) -> dict[str, Estimate]:
        """By name."""
        if self.scores is not None:
            return {"spearman": of_rows(self._spearman, len(self.scores))}
        loss, nearest, reciprocal = self.terms
        within = (1 / reciprocal <= NEAR + 0.5).astype(float)
        named = {"recall@1": nearest, f"recall@{NEAR}": within, "mrr": reciprocal, "loss, nats an anchor": loss}
        return {name: mean_score(values) for name, values in named.items()}

    def _spearman(self, draws: np.ndarray) -> np.ndarray:
        """Of drawn rows, `(.., rows)`."""
        assert self.scores is not None
        flat = draws.reshape(-1, draws.shape[-1])
        found = [spearman(self.cosines[rows], self.scores[rows]) for rows in flat]
        return np.array(found).reshape(draws.shape[:-1])


@dataclass(frozen=True)
class TextsCompared(Event):
    """A run's embeddings of held-out texts have been compared with its base's."""

    base: Neighbours
    tuned: Neighbours

    def figures(self) -> dict[str, tuple[Estimate, Estimate]]:
        """Base and tuned, by name."""
        base, tuned = self.base.figures(), self.tuned.figures()
        return {name: (base[name], tuned[name]) for name in base}


@torch.no_grad()
def embed_texts(model: EmbeddedModel, texts: Sequence[TextRow], pooling: Pooling) -> Tensor:
    """fp32 `(texts, hidden)`, on the CPU, in their order, each of length 1."""
    model.eval()
    found = torch.zeros(len(texts), model.module.config.get_text_config().hidden_size)
    for micro in split_micro_batches(range(len(texts)), [len(text) for text in texts], MICRO_BATCH, model.packed):
        batch = model.collate([texts[number] for number in micro]).to(model.device)
        found[micro] = model.embeddings(batch, pooling).cpu()
    return found


def neighbours(model: EmbeddedModel, objective: Embedding, rows: Sequence[ComparedTexts]) -> Neighbours:
    """What a model makes of rows."""
    assert objective.task.pooling is not None
    embeddings = embed_texts(model, texts_of(rows), objective.task.pooling).double()
    counts = np.array([len(row.lengths) for row in rows])
    first = torch.from_numpy(counts.cumsum() - counts)
    cosines = (embeddings[first] * embeddings[first + 1]).sum(dim=1)
    scores = np.array([row.score for row in rows], dtype=np.float64) if objective.scored else None
    return Neighbours(objective.terms_of(embeddings, rows).numpy(), cosines.numpy(), scores)


def evaluate_embeddings(opened: OpenRun, config: EvalConfig, report: Listener = silent) -> TextsCompared:
    """Compare a run that embeds texts with its base on held-out rows, and write its report.

    Raises:
        ConfigError: an option is given that is for answers.
        DataError: as `held_out_rows`.
    """
    check_no_answers(opened, config)
    rows = compared_of(held_out_rows(opened, config.evaluation.data, config.data.allow))
    device, dtype = set_up(config.machine)
    objective = objective_of(opened, rows)
    module = load_tuned(opened, dtype, device, report)
    model = EmbeddedModel.of(module)
    tuned = neighbours(model, objective, rows)
    opened.switch(module, tuned=False)
    found = TextsCompared(neighbours(model, objective, rows), tuned)
    report(found)
    write_findings(opened, _findings(opened, found, rows), report)
    return found


def objective_of(opened: OpenRun, rows: Sequence[EncodedExample]) -> Embedding:
    """The run's objective, for rows of this kind."""
    objective = make_objective(opened.config.objective)
    assert isinstance(objective, Embedding)
    return replace(objective, task=opened.source.task, scored=has_scores(rows))


def _findings(opened: OpenRun, found: TextsCompared, rows: Sequence[ComparedTexts]) -> Findings:
    figures = found.figures()
    told: dict[str, Any] = {"rows": len(rows)}
    told |= {name: {"base": base.to_json(), "tuned": tuned.to_json()} for name, (base, tuned) in figures.items()}
    said = {name: f"{in_words(tuned)}; base {in_words(base)}" for name, (base, tuned) in figures.items()}
    drawn = Picture("Cosines of texts that belong together", "cosines.png", partial(draw_cosines, found))
    what = f"{len(rows)} held-out rows of texts"
    if found.tuned.scores is not None:
        return Findings(what, said, (), (drawn,), told)
    ranks = np.rint(1 / found.tuned.terms[2]).astype(int)
    worst = [int(i) for i in np.argsort(-ranks, kind="stable") if ranks[i] > 1][:WRONG_SHOWN]
    cells = [(rows[i].origin, *_first_two(opened, rows[i]), str(ranks[i])) for i in worst]
    table = Table("Texts that are farthest from what belongs to them", ("row", "anchor", "positive", "rank"), cells)
    return Findings(what, said, (table,), (drawn,), told)


def _first_two(opened: OpenRun, row: ComparedTexts) -> tuple[str, ...]:
    decode = opened.template.tokenizer.decode
    said = (decode(text.input_ids.tolist(), skip_special_tokens=True) for text in row.texts[:2])
    return tuple(str(text)[:CHARACTERS_SHOWN] for text in said)


def draw_cosines(found: TextsCompared, out: Path | BinaryIO) -> None:
    """Draw how many rows have which cosine of anchor and positive; of pairs with scores, each pair's."""
    scores = found.tuned.scores
    with picture(out, "cosine", "rows" if scores is None else "score") as axes:
        for name, each, colour in (("base", found.base, "tab:orange"), ("tuned", found.tuned, "tab:blue")):
            if scores is None:
                axes.hist(each.cosines, bins=30, alpha=0.6, color=colour, label=name)
            else:
                axes.plot(each.cosines, scores, ".", alpha=0.6, color=colour, label=name)
        axes.grid(alpha=0.3)
        axes.legend()
