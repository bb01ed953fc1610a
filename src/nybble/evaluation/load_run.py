"""A finished run, loaded again: its base in the same four bits, its adapter, its template."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from nybble.config import TrainConfig, load_config
from nybble.data.template import ChatTemplate
from nybble.errors import RunError
from nybble.layers.peft_format import read_adapter
from nybble.layers.precision import resolve_compute_dtype, resolve_device
from nybble.models.source import open_source
from nybble.training.base import kept_base
from nybble.training.run_folder import RunFolder
from nybble.training.session import base_specs, load_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoadedRun:
    """What answering and evaluating need of a run."""

    config: TrainConfig
    model: "PreTrainedModel"
    template: ChatTemplate


def load_run(path: Path, console: Console, device: str = "auto", compute_dtype: str = "auto") -> LoadedRun:
    """Load the run in `path` as it was trained: same base, same format, its last adapter.

    Raises:
        RunError: the folder holds no run, or its adapter is missing or damaged.
    """
    run = RunFolder(path)
    if not run.config.is_file():
        raise RunError(
            f"{path} holds no run.",
            "A run folder is what `nybble train --out` makes.",
            "Check the path given to --run.",
        )
    config = load_config(run.config, {})
    target = resolve_device(device)
    source = open_source(config.model, config.tokenizer)
    template = ChatTemplate(source.load_tokenizer(), config.template)
    dtype = resolve_compute_dtype(compute_dtype, target)
    model = load_base(config, kept_base(run) or source, base_specs(config, run), dtype, target, console)
    read_adapter(model, run.adapter)
    model.requires_grad_(False)
    return LoadedRun(config, model.eval(), template)
