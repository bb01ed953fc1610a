"""A finished run, opened or loaded again: its base in the same four bits, its adapter, its template."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nybble import __version__
from nybble.data.open_template import open_template
from nybble.data.prompts import PromptTemplate
from nybble.data.row_kinds import row_kind
from nybble.data.template import ChatTemplate
from nybble.errors import ConfigError, ModelError, NybbleError, RunError
from nybble.events import Listener, silent
from nybble.formats.quant_spec import BaseFormats
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import enable_adapters
from nybble.layers.pictured_lm import reading
from nybble.layers.precision import set_up
from nybble.layers.seq2seq_lm import Seq2SeqLM
from nybble.options.groups import MachineOptions
from nybble.options.option import with_options
from nybble.options.verbs import TrainConfig, load_config
from nybble.runs.adapter_files import read_adapter
from nybble.runs.base import base_formats, data_free_rounding, in_asked_bits, kept_base
from nybble.runs.context import within_context
from nybble.runs.folder import RunFolder
from nybble.runs.task_file import read_task
from nybble.sources.load import load_model, refill
from nybble.sources.open import open_model
from nybble.sources.skeleton import reads_whole
from nybble.sources.stored_model import StoredModel
from nybble.sources.task import PICTURED, TOKENS, task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ASKED = {  # what runs that do not write answer
    "classify": "classify(texts), or .tag(texts)",
    "reward": "rewards(conversations)",
    "embed": "embed(texts)",
}


@dataclass(frozen=True)
class OpenRun:
    """A run's folder, options, base and template; no weights have been read.

    Args:
        source: the base as its makers publish it.
        base: what the frozen weights are loaded from.
    """

    run: RunFolder
    config: TrainConfig
    source: StoredModel
    base: StoredModel
    template: ChatTemplate

    @property
    def full(self) -> bool:
        """Whether every weight was trained, and there is no adapter."""
        return self.config.method.method == "full"

    @property
    def trained(self) -> Path:
        """The folder of what was trained: the adapter, or the whole model."""
        return self.run.trained(self.full)

    @cached_property
    def computed_by(self) -> type[CausalLM]:
        """What computes the model of a run that writes: with what reads its pictures, where it reads some."""
        if self.source.task.prompted:
            return Seq2SeqLM
        reader = self.source.picture_reader
        return reading(reader) if self.source.task.kind == "pictured" and reader is not None else CausalLM

    @cached_property
    def tuned(self) -> StoredModel:
        """The tuned model of a run that trained every weight.

        Raises:
            RunError: there is none.
        """
        if not self.run.model.is_dir():
            raise RunError(
                f"{self.run.path} holds no model yet.",
                "A run that trains every weight writes it when it ends or is interrupted.",
                f"Let it end: nybble train --resume --out {self.run.path}",
            )
        return open_model(str(self.run.model))

    def switch(self, model: "PreTrainedModel", tuned: bool) -> None:
        """Make a model of `load_tuned` its base, with False, or the tuned one again."""
        if self.full:
            refill(model, self.tuned if tuned else self.source)
        else:
            enable_adapters(model, tuned)

    @property
    def formats(self) -> BaseFormats | None:
        """How the base is quantised, None where it stays in 16 bits."""
        return base_formats(self.config.weights, self.config.rounding.mixed, self.run)


@dataclass(frozen=True)
class LoadedModel:
    """What answering needs: of a run, or of a model without one."""

    model: "PreTrainedModel"
    template: ChatTemplate


def open_run(path: Path, report: Listener = silent) -> OpenRun:
    """Open the run in `path`.

    Raises:
        RunError: the folder holds no run, another version of nybble made it and this one cannot read its options, or
            what these name is no longer the base it was trained on.
    """
    run = RunFolder(path)
    if not run.config.is_file():
        raise RunError(
            f"{path} holds no run.",
            "A run folder is what `nybble train --out` makes.",
            "Check the path given to --run.",
        )
    try:
        config = load_config(run.config, {})
    except ConfigError as error:
        raise _unreadable(run, error) from error
    task, named = read_task(run) or TOKENS, config.model
    stored = open_model(named.model, named.tokenizer, report, named.revision)
    source = in_asked_bits(stored.for_task(task), config.weights)
    config = with_options(config, max_seq_len=within_context(config.data.max_seq_len, source))
    _check_base(run, source)
    kind = row_kind(config.objective.objective, prompted=task.prompted)
    reader = source.picture_reader if task.kind == "pictured" else None  # a run over text reads text alone
    template = open_template(config.data, source.load_tokenizer(), run.chat_template, kind, reader)
    return OpenRun(run, config, source, kept_base(run, task) or source, template)


def load_run(path: Path, machine: MachineOptions, report: Listener = silent) -> LoadedModel:
    """Load the run in `path` as it was trained: same base, same format, its last adapter.

    Raises:
        RunError: the folder holds no run, its base is another now, or what it trained is missing or damaged.
    """
    opened, (device, dtype) = open_run(path, report), set_up(machine)
    check_answers(opened)
    return LoadedModel(load_tuned(opened, dtype, device, report), opened.template)


def check_answers(opened: OpenRun) -> None:
    """Refuse a run whose model does not go on with a text.

    Raises:
        ConfigError: its head gives something else.
    """
    if not opened.source.task.writes:
        raise ConfigError(
            f"The run in {opened.run.path} is {opened.source.task.words}, which does not write answers.",
            "Allowed here: runs of language models.",
            f"Ask it for what it gives: nybble.open_run(RUN).{ASKED[opened.config.objective.objective]}, or "
            "`nybble eval --run RUN`.",
        )


def load_plain(name: str, machine: MachineOptions, report: Listener = silent, *, pictures: bool = False) -> LoadedModel:
    """Load a model that is no run, such as a merged one, in the bits that it is stored in.

    Args:
        pictures: of one that reads them, all of it; else its language model alone, where that can be.

    Raises:
        ModelError: there is none, it is damaged, or it reads no pictures where they are wanted.
    """
    source, (device, dtype) = open_model(name, report=report), set_up(machine)
    if pictures and source.picture_reader is None:
        raise ModelError(f"{name} reads text alone.", "Pictures are for vision-language models.", "Leave them out.")
    task = PICTURED if pictures else task_of("sft", source.config)
    if reads_whole(source.config):
        raise ModelError(
            f"{name} is an encoder, which writes no answers.",
            "Allowed here: models that go on with texts, or answer prompts.",
            "Train it to tell texts apart or to embed them: nybble train --objective classify or embed.",
        )
    source = source.for_task(task)
    formats = BaseFormats() if source.quant_spec is not None else None  # what is in four bits keeps its own
    model = load_model(source, formats, dtype, device, report=report)
    tokenizer = source.load_tokenizer()
    if source.task.prompted:
        return LoadedModel(model, PromptTemplate(tokenizer))
    reader = source.picture_reader if source.task.kind == "pictured" else None
    return LoadedModel(model, ChatTemplate(tokenizer, reader=reader))


def load_tuned(
    opened: OpenRun, dtype: torch.dtype, device: torch.device, report: Listener = silent
) -> "PreTrainedModel":
    """The base of a run in its four bits with the run's adapter beside it, or the model that it trained whole; frozen
    and in eval mode.
    """
    if opened.full:
        return load_model(opened.tuned, None, dtype, device, report=report)
    model = load_frozen(opened, dtype, device, report)
    read_adapter(model, opened.run.adapter)
    model.requires_grad_(False)
    return model.eval()


def load_frozen(
    opened: OpenRun, dtype: torch.dtype, device: torch.device, report: Listener = silent
) -> "PreTrainedModel":
    """The base of a run in the four bits that it was trained on, without an adapter."""
    rounding = data_free_rounding(opened.config.rounding)
    return load_model(opened.base, opened.formats, dtype, device, rounding, report=report)


def _unreadable(run: RunFolder, error: ConfigError) -> NybbleError:
    """The error itself where this version made the run: then someone has changed its options."""
    made_by = run.recorded().get("nybble")
    if made_by == __version__:
        return error
    maker = "an earlier nybble" if made_by is None else f"nybble {made_by}"
    return RunError(
        f"{run.path} was made by {maker}, and this one, {__version__}, cannot read its options. {error.got}",
        error.allowed,
        "Open it with the version that made it, or train again.",
    )


def _check_base(run: RunFolder, source: StoredModel) -> None:
    """Compare the base with the one that was trained on; runs from before that was recorded are let through."""
    recorded = run.recorded().get("fingerprint")
    if recorded is not None and recorded != source.fingerprint():
        raise RunError(
            f"{source.name} is not the base that {run.path} was trained on: its fingerprint is another.",
            f"Allowed: the base with the fingerprint {recorded[:16]}...",
            "Put the original base back in its place.",
        )
