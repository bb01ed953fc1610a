"""What held-out pairs say of a reward model: how often the chosen answer is given more, and by how much."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nybble.data.examples import EncodedExample
from nybble.data.reward_rows import ScoredPair, pairs_of
from nybble.data.text_rows import texts_of
from nybble.evaluation.classes import scores_of
from nybble.evaluation.evaluation_rows import held_out_rows
from nybble.evaluation.findings import Findings, Picture, Table, check_no_answers, in_words, write_findings
from nybble.evaluation.scores import Estimate, mean_score
from nybble.events import Event, Listener, silent
from nybble.layers.precision import set_up
from nybble.layers.scored import ScoredModel
from nybble.options.verbs import EvalConfig
from nybble.pictures import picture
from nybble.runs.open_run import OpenRun, load_tuned

WRONG_SHOWN, CHARACTERS_SHOWN = 10, 300


@dataclass(frozen=True)
class PairsJudged:
    """What a reward model makes of held-out pairs.

    Args:
        chosen, rejected: fp64 `(pairs,)`, what their answers are given.
        margins: fp64 `(pairs,)`, how far apart they are to be.
    """

    chosen: Tensor
    rejected: Tensor
    margins: Tensor

    def loss(self) -> Estimate:
        """Mean of −log σ(r(chosen) − r(rejected) − margin), nats."""
        return mean_score((-logsigmoid(self.chosen - self.rejected - self.margins)).tolist())

    def accuracy(self) -> Estimate:
        """Share of the pairs whose chosen answer is given more."""
        return mean_score((self.chosen > self.rejected).double().tolist())

    def margin(self) -> Estimate:
        """Mean of r(chosen) − r(rejected)."""
        return mean_score((self.chosen - self.rejected).tolist())

    def figures(self) -> dict[str, str]:
        """What there is to say in numbers, in words."""
        return {
            "accuracy": in_words(self.accuracy()),
            "margin": in_words(self.margin()),
            "reward of chosen answers": in_words(mean_score(self.chosen.tolist())),
            "reward of rejected answers": in_words(mean_score(self.rejected.tolist())),
            "loss, nats a pair": in_words(self.loss()),
        }


@dataclass(frozen=True)
class RewardsEvaluated(Event):
    """A run's rewards of held-out pairs have been looked at."""

    judged: PairsJudged


def judge_pairs(model: ScoredModel, rows: Sequence[EncodedExample]) -> PairsJudged:
    """What the model makes of pairs."""
    pairs = pairs_of(rows)
    chosen, rejected = torch.cat(scores_of(model, texts_of(pairs)))[:, 0].double().view(-1, 2).T
    return PairsJudged(chosen, rejected, torch.tensor([pair.margin for pair in pairs], dtype=torch.float64))


def evaluate_rewards(opened: OpenRun, config: EvalConfig, report: Listener = silent) -> PairsJudged:
    """Judge a reward model by its held-out pairs, and write its report.

    Raises:
        ConfigError: an option is given that is for answers.
        DataError: as `held_out_rows`.
    """
    check_no_answers(opened, config)
    rows = held_out_rows(opened, config.evaluation.data, config.data.allow)
    device, dtype = set_up(config.machine)
    judged = judge_pairs(ScoredModel.of(load_tuned(opened, dtype, device, report)), rows)
    report(RewardsEvaluated(judged))
    write_findings(opened, _findings(opened, judged, pairs_of(rows)), report)
    return judged


def _findings(opened: OpenRun, judged: PairsJudged, pairs: Sequence[ScoredPair]) -> Findings:
    estimates = {"loss": judged.loss(), "accuracy": judged.accuracy(), "margin": judged.margin()}
    told: dict[str, Any] = {"rows": len(pairs)} | {name: each.to_json() for name, each in estimates.items()}
    margins = judged.chosen - judged.rejected
    worst = [i for i in margins.argsort().tolist() if margins[i] <= 0][:WRONG_SHOWN]
    rows = [(pairs[i].origin, *_answers(opened, pairs[i]), f"{margins[i]:.3f}") for i in worst]
    wrong = Table("Pairs that it is surest to be wrong about", ("row", "chosen", "rejected", "margin"), rows)
    drawn = Picture("Margins of the pairs", "margins.png", partial(draw_margins, margins))
    return Findings(f"{len(pairs)} held-out pairs", judged.figures(), (wrong,), (drawn,), told)


def _answers(opened: OpenRun, pair: ScoredPair) -> tuple[str, ...]:
    decode = opened.template.tokenizer.decode
    said = (decode(text.input_ids[text.supervised].tolist(), skip_special_tokens=True) for text in pair.texts)
    return tuple(text.strip()[:CHARACTERS_SHOWN] for text in said)


def draw_margins(margins: Tensor, out: Path | BinaryIO) -> None:
    """Draw how many pairs have which margin."""
    with picture(out, "reward of the chosen answer − of the rejected one", "pairs") as axes:
        axes.hist(margins.tolist(), bins=30, color="tab:blue")
        axes.axvline(0, color="grey", linestyle=":")
        axes.grid(alpha=0.3)
