"""What a training run gives back."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.data.examples import EncodedExample
from nybble.data.template import ChatTemplate
from nybble.layers.convert import enable_adapters
from nybble.options.verbs import TrainConfig
from nybble.runs.folder import RunFolder
from nybble.sources.load import refill
from nybble.sources.open import open_model
from nybble.sources.stored_model import StoredModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RunResult:
    """A run that ended, by itself or by the user, with its model still in memory. Wherever a run's path is taken, it is
    too.

    Args:
        folder: what lies where on the disk.
        config: options as they were settled.
        steps: done, those of earlier sessions of the run included.
        loss_before, loss_after: over the held-out rows that were evaluated, nats a supervised token; None where no
            evaluation came to its end, or no row is held out.
        interrupted: the signal that ended it early.
        peak_memory_bytes: of the process, or of the GPU's memory.
        source: of the base.
        model: the base with the trained adapters, or the trained model, in training's memory layout.
        streamed: the base's weights are read from the disk whenever they are used.
        validation: rows that were not trained on.
    """

    folder: RunFolder
    config: TrainConfig
    steps: int
    loss_before: float | None
    loss_after: float | None
    interrupted: signal.Signals | None
    peak_memory_bytes: int
    source: StoredModel
    model: "PreTrainedModel"
    streamed: bool
    template: ChatTemplate
    validation: Sequence[EncodedExample]

    def __fspath__(self) -> str:
        return str(self.folder.path)

    @property
    def full(self) -> bool:
        """Whether every weight was trained, and there is no adapter."""
        return self.config.method.method == "full"

    @property
    def writes_answers(self) -> bool:
        """Whether it is a language model, which goes on with a text, or answers one."""
        return self.source.task.writes

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter, in PEFT's format; of a run that has one."""
        return self.folder.adapter

    @property
    def trained(self) -> Path:
        """The folder of what was trained: the adapter, or the whole model."""
        return self.folder.trained(self.full)

    def switch(self, tuned: bool) -> None:
        """Make the model in memory its base, with False, or the tuned one again."""
        if self.full:
            refill(self.model, open_model(str(self.folder.model)) if tuned else self.source)
        else:
            enable_adapters(self.model, tuned)
