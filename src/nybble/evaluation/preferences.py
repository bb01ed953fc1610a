"""What a run that learnt from preferences makes of held-out ones: its objective's metrics, and how far it went."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nybble.data.examples import EncodedExample
from nybble.data.packing import pack
from nybble.data.preference_rows import PreferenceRow, to_follow
from nybble.evaluation.scores import Estimate, mean_score
from nybble.events import Listener, Note
from nybble.kernels.hardware import as_double
from nybble.layers.causal_lm import CausalLM
from nybble.options.objective_groups import WITH_REFERENCE
from nybble.runs.open_run import OpenRun
from nybble.training.loop import Measured, validation_loss
from nybble.training.objectives import make_objective
from nybble.training.reference import adapters_off, known_references

KL_ROWS = 64  # whose answers are asked about
KL_POSITIONS = 128  # whose logits are held at once


@dataclass(frozen=True)
class Preferences:
    """Held-out preferences.

    Args:
        objective: its name.
        rows: pairs, or judged answers.
        base, tuned: loss and metrics of the base as it was trained on, and of the tuned model.
        kl: KL(tuned || base) of what comes next, a token of the answers to follow, nats.
    """

    objective: str
    rows: int
    base: Measured
    tuned: Measured
    kl: Estimate

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and numbers."""
        return asdict(self) | {"kl": self.kl.to_json()}


def ask_preferences(
    opened: OpenRun, model: CausalLM, rows: Sequence[EncodedExample], micro_batch_size: int, report: Listener
) -> Preferences:
    """Ask a tuned model and, its adapters off, its base.

    Args:
        rows: of the run's own kind. The reference is what the run was compared with, where its folder says what that
            makes of them all; else the base.
    """
    config = opened.config
    objective = make_objective(config.objective)
    complete = objective.complete(rows, config.data.seed, config.data.max_seq_len)
    compared = known_references(opened.run.reference, complete)
    known = all(isinstance(row, PreferenceRow) and row.reference for row in compared)
    if not known and config.adapters.begins_with_an_effect and config.objective.objective in WITH_REFERENCE:
        report(Note("rewards are against the bare base: what training began with was not asked about these rows", True))
    tuned = validation_loss(objective, model, compared, micro_batch_size)
    with adapters_off(model):
        base = validation_loss(objective, model, compared, micro_batch_size)
    followed = to_follow(rows)[:KL_ROWS]
    return Preferences(config.objective.objective, len(rows), base, tuned, mean_score(_kl_of_rows(model, followed)))


@torch.no_grad()
def _kl_of_rows(model: CausalLM, rows: Sequence[EncodedExample]) -> list[float]:
    """Mean KL(tuned || base) over the supervised tokens of each row."""
    found = []
    for row in rows:
        batch = pack([row]).to(model.device)
        tuned = model.hidden(batch)
        with adapters_off(model):
            base = model.hidden(batch)
        total = 0.0
        for ours, theirs in zip(tuned.split(KL_POSITIONS), base.split(KL_POSITIONS), strict=True):
            log_p = as_double(model.head.logits(ours)).log_softmax(dim=-1)
            with adapters_off(model):
                log_q = as_double(model.head.logits(theirs)).log_softmax(dim=-1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
        found.append(total / len(tuned))
    return found


def is_preference(rows: Sequence[EncodedExample]) -> bool:
    """Whether rows compare answers."""
    return all(isinstance(row, PreferenceRow) for row in rows)
