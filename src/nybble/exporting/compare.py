"""`nybble merge --compare`: what each way of merging costs, in held-out loss, measured and not assumed."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from nybble.errors import ExportError
from nybble.evaluation.evaluation_rows import evaluation_rows
from nybble.events import Event, Listener, silent
from nybble.exporting.merged_source import MergedSource
from nybble.exporting.rounding import load_rounded, rounding_input
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import adapters_of, enable_adapters
from nybble.layers.precision import resolve_compute_dtype
from nybble.options.use_groups import ArtefactKind
from nybble.options.verbs import MergeConfig
from nybble.runs.open_run import check_answers, load_tuned, open_run
from nybble.sources.load import load_model
from nybble.training.loop import validation_loss
from nybble.training.objective import SupervisedFineTuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU = torch.device("cpu")
MICRO_BATCH = 8  # rows computed at once


@dataclass(frozen=True)
class MergesCompared(Event):
    """Held-out losses in nats a token, by the way of merging: of the base in 16 bits, as it was trained on, of base and
    adapter kept apart, then of each merge.
    """

    losses: dict[str, float]
    num_rows: int
    num_tokens: int


def compare_merges(config: MergeConfig, report: Listener = silent) -> MergesCompared:
    """The held-out loss of base, kept-separate and each merge."""
    assert config.run.run is not None
    opened = open_run(config.run.run, report)
    if opened.full:
        raise ExportError(
            f"{opened.run.path} trained every weight: there is nothing to merge.",
            "Compared are ways of merging an adapter.",
            f"{opened.run.model} holds the tuned model; `nybble export` writes other forms of it.",
        )
    check_answers(opened)
    if opened.source.task.kind != "tokens":
        raise ExportError(
            f"The run in {opened.run.path} is {opened.source.task.words}.",
            "Ways of merging are compared of models that read text alone and go on with it.",
            "Leave --compare out: `nybble merge` writes its 16 bits, verified.",
        )
    rows = evaluation_rows(opened, config.run.data, config.data.allow)
    calibration = rounding_input(opened, config.rounding, rows, report)
    dtype = resolve_compute_dtype("auto", CPU)
    original, dequantized = MergedSource(opened, "original"), MergedSource(opened, "dequantized")
    arms: dict[str, Callable[[], PreTrainedModel]] = {
        "base, 16 bits": lambda: load_model(opened.source, None, dtype),
        "base, as trained on": lambda: _without_adapters(load_tuned(opened, dtype, CPU, report)),
        "kept apart: base as trained on, adapter": lambda: load_tuned(opened, dtype, CPU, report),
        "merged, 16 bits, onto dequantized": lambda: load_model(dequantized, None, dtype),
        "merged, 16 bits, onto original": lambda: load_model(original, None, dtype),
    }
    for rounding in dict.fromkeys(("absmax", config.rounding.quality)):  # the plain way for comparison
        for onto, merged in (("original", original), ("dequantized", dequantized)):
            arms[f"merged, {ArtefactKind.FOUR_BIT} {rounding}, onto {onto}"] = partial(
                load_rounded, merged, rounding, calibration, dtype
            )
    losses = {}
    for name, load in arms.items():
        model = load()
        causal_lm = CausalLM.of(model)
        found = validation_loss(SupervisedFineTuning(), causal_lm, rows, MICRO_BATCH)
        losses[name], num_tokens = found.loss, found.supervised_tokens
        del model, causal_lm
        gc.collect()  # modules refer to each other, and the next model needs the room
    compared = MergesCompared(losses, len(rows), num_tokens)
    report(compared)
    return compared


def _without_adapters(model: "PreTrainedModel") -> "PreTrainedModel":
    assert adapters_of(model)
    enable_adapters(model, False)
    return model
