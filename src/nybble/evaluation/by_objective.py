"""What a run that learnt from preferences, or from a teacher, makes of held-out rows: its objective's metrics, and how
far it went from its base.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from nybble.data.examples import EncodedExample
from nybble.data.packing import pack
from nybble.data.preference_rows import PreferenceRow, to_follow
from nybble.evaluation.scores import Estimate, mean_score
from nybble.events import Listener, Note
from nybble.files.spool import Chosen
from nybble.kernels.hardware import as_double
from nybble.layers.causal_lm import CausalLM
from nybble.options.objective_groups import PREFERENCES, WITH_REFERENCE
from nybble.runs.open_run import OpenRun
from nybble.training.loop import Measured, validation_loss
from nybble.training.objectives import make_objective
from nybble.training.reference import adapters_off, known_references
from nybble.training.teacher import Taught

KL_ROWS = 64  # whose answers are asked about
KL_POSITIONS = 128  # whose logits are held at once


@dataclass(frozen=True)
class ByObjective:
    """Held-out rows, measured as the objective measures them.

    Args:
        objective: its name.
        rows: pairs, judged answers, or examples that its teacher was asked about.
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


def ask_by_objective(
    opened: OpenRun, model: CausalLM, rows: Sequence[EncodedExample], micro_batch_size: int, report: Listener
) -> ByObjective | None:
    """Ask a tuned model and, its adapters off, its base; None of objectives that tell nothing else than the loss, and
    where nothing can be told.

    Args:
        rows: of the run's own kind.
    """
    name = opened.config.objective.objective
    if name not in (*PREFERENCES, "distill"):
        return None
    if opened.full:
        said = "is not told: a base that became the tuned model is not asked beside it"
        report(Note(f"what {name} makes of held-out rows {said}", warning=True))
        return None
    compared = _taught(opened, rows, report) if name == "distill" else _with_reference(opened, rows, report)
    if not compared:
        return None
    objective = make_objective(opened.config.objective)
    tuned = validation_loss(objective, model, compared, micro_batch_size)
    with adapters_off(model):
        base = validation_loss(objective, model, compared, micro_batch_size)
    followed = to_follow(compared)[:KL_ROWS]
    return ByObjective(name, len(compared), base, tuned, mean_score(_kl_of_rows(model, followed)))


def _taught(opened: OpenRun, rows: Sequence[EncodedExample], report: Listener) -> Sequence[EncodedExample]:
    """Those rows that the run's teacher was asked about, with what it said."""
    taught = Taught.open(opened.run.teacher)
    if taught is None:
        report(Note(f"there is nothing in {opened.run.teacher}: nothing is compared with the teacher", warning=True))
        return ()
    unknown = taught.records.unknown(rows)
    if len(unknown):
        left = f"{len(unknown)} of {len(rows)} rows are not compared with the teacher"
        report(Note(f"{left}, which was asked about those that the run evaluated", warning=True))
    return taught.attached(Chosen(rows, np.setdiff1d(np.arange(len(rows)), unknown)))


def _with_reference(opened: OpenRun, rows: Sequence[EncodedExample], report: Listener) -> Sequence[EncodedExample]:
    """The rows with what the run was compared with, where its folder says what that makes of them all; else it is the
    base.
    """
    config = opened.config
    complete = make_objective(config.objective).complete(rows, config.data.seed, config.data.max_seq_len)
    compared = known_references(opened.run.reference, complete)
    known = all(isinstance(row, PreferenceRow) and row.reference for row in compared)
    if not known and config.adapters.begins_with_an_effect and config.objective.objective in WITH_REFERENCE:
        report(Note("rewards are against the bare base: what training began with was not asked about these rows", True))
    return compared


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
