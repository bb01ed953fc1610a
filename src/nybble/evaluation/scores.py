"""What held-out rows say: loss with confidence intervals, and how well answers match their references."""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nybble.data.examples import EncodedExample
from nybble.data.sampler import split_micro_batches
from nybble.layers.causal_lm import CausalLM

RESAMPLES = 2000
CONFIDENCE = 0.95
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Estimate:
    """A figure and its confidence interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return vars(self)


@torch.no_grad()
def row_losses(model: CausalLM, rows: Sequence[EncodedExample], micro_batch_size: int) -> np.ndarray:
    """The summed loss of each row's supervised tokens in nats, fp64 `(rows,)`."""
    losses = np.zeros(len(rows))
    lengths = [len(row) for row in rows]
    for micro in split_micro_batches(range(len(rows)), lengths, micro_batch_size, model.packed):
        batch = model.collate([rows[row] for row in micro]).to(model.device)
        tokens = model.token_losses(batch).cpu().double()
        counts = [rows[row].supervised_tokens for row in micro]
        losses[list(micro)] = [part.sum().item() for part in tokens.split(counts)]
    return losses


def mean_loss(losses: np.ndarray, tokens: np.ndarray) -> Estimate:
    """Loss a token over all rows, `(rows,)` each; rows are drawn again with replacement for the interval."""
    return of_rows(lambda rows: losses[rows].sum(-1) / tokens[rows].sum(-1), len(losses))


def mean_score(scores: Sequence[float]) -> Estimate:
    """Mean of one score a row."""
    values = np.asarray(scores, dtype=np.float64)
    return of_rows(lambda rows: values[rows].mean(-1), len(values))


def of_rows(statistic: Callable[[np.ndarray], np.ndarray], num_rows: int) -> Estimate:
    """The statistic of all rows, and the percentile interval over RESAMPLES draws of as many rows.

    Args:
        statistic: of rows, int64 `(..., num_rows)`, which may be drawn several times -> `(...)`.
    """
    draws = np.random.default_rng(0).integers(num_rows, size=(RESAMPLES, num_rows))
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(statistic(draws), [outside, 1 - outside])
    return Estimate(float(statistic(np.arange(num_rows))), float(low), float(high))


# ---- answers -------------------------------------------------------------------------------------


def exact_match(answer: str, reference: str) -> float:
    """1 where they are the same, white space aside."""
    return float(answer.split() == reference.split())


def token_f1(answer: str, reference: str) -> float:
    """F1 over words, case, punctuation and articles aside (SQuAD: Rajpurkar et al. 2016, arXiv 1606.05250)."""
    ours, theirs = _words(answer), _words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def number_match(answer: str, reference: str) -> float:
    """1 where the last number in both is the same (GSM8K: Cobbe et al. 2021, arXiv 2110.14168)."""
    ours, theirs = last_number(answer), last_number(reference)
    return float(ours is not None and theirs is not None and math.isclose(ours, theirs, rel_tol=1e-9))


def last_number(text: str) -> float | None:
    """The last number in a text, thousands' commas aside."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _words(text: str) -> list[str]:
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return _ARTICLES.sub(" ", bare).split()


METRICS: dict[str, Callable[[str, str], float]] = {"exact": exact_match, "f1": token_f1, "number": number_match}


def choose_metrics(wanted: str, references: Sequence[str]) -> list[str]:
    """The metric that was asked for; with "auto", those that the references allow: numbers where each has one."""
    if wanted != "auto":
        return [] if wanted == "none" else [wanted]
    numeric = bool(references) and all(last_number(reference) is not None for reference in references)
    return ["exact", "f1", *(["number"] if numeric else [])]
