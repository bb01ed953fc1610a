"""What a training run tells of itself. Those with a `kind` lie in its `events.jsonl`, under these names and fields."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from nybble.events import Event


@dataclass(frozen=True)
class RunStarted(Event):
    """A run was asked for; nothing has been opened yet."""

    kind: ClassVar[str] = "start"
    model: str
    data: tuple[str, ...]
    resumes: bool


@dataclass(frozen=True)
class ModelOpened(Event):
    """The base that the run starts from, and what there is to say about it."""

    kind: ClassVar[str] = "model"
    name: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class AdapterTaken(Event):
    """The run trains on from this adapter."""

    kind: ClassVar[str] = "adapter"
    path: str
    sha256: str


@dataclass(frozen=True)
class TeacherAsked(Event):
    """A teacher was asked about rows, and is gone.

    Args:
        format: of its weights; "none" for 16 bits, "stored" for few bits of its own.
        tokens: that went through it.
        seconds, predicted_s: with its loading; without.
        peak_bytes, predicted_peak_bytes: while it was there.
    """

    kind: ClassVar[str] = "teacher"
    name: str
    format: str
    rows: int
    tokens: int
    seconds: float
    predicted_s: float
    peak_bytes: int
    predicted_peak_bytes: int


@dataclass(frozen=True)
class Resumed(Event):
    """The run goes on after this step."""

    kind: ClassVar[str] = "resume"
    step: int


@dataclass(frozen=True)
class TrainingBegun(Event):
    """The steps begin.

    Args:
        total_steps: of the whole run.
        after: the step that the run goes on after; None at its beginning.
        options: of the run as they are settled, by name; the log leaves them out, config.yaml has them.
    """

    kind: ClassVar[str] = "begin"
    total_steps: int
    after: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """As `Event` says."""
        recorded = super().fields()
        del recorded["options"]
        return recorded


@dataclass(frozen=True)
class RateTried(Event):
    """--lr auto: the small run for this rate is done.

    Args:
        loss: held-out, after so many `steps`; None where a loss was not finite.
        small_lr: the rate in so few steps.
    """

    kind: ClassVar[str] = "lr-tried"
    lr: float
    loss: float | None
    steps: int
    small_lr: float


@dataclass(frozen=True)
class RateChosen(Event):
    """--lr auto: the rate that the run takes."""

    kind: ClassVar[str] = "lr"
    lr: float
    why: str


@dataclass(frozen=True)
class Step(Event):
    """An optimizer step is done.

    Args:
        loss: mean over its supervised tokens, nats.
        grad_norm: before clipping.
        tokens, supervised_tokens: of its rows.
        memory_bytes: held by the process now.
        metrics: the objective's, by name; the log has each under its own.
    """

    kind: ClassVar[str] = "step"
    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    step_s: float
    tokens_per_s: float
    memory_bytes: int
    metrics: Mapping[str, float] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """As `Event` says."""
        return _unfolded(super().fields())


@dataclass(frozen=True)
class HeldOutLoss(Event):
    """Held-out rows were evaluated after this step, 0 before the first.

    Args:
        unit: of the loss; the log leaves it out.
        metrics: the objective's, by name; the log has each under its own.
    """

    kind: ClassVar[str] = "eval"
    step: int
    loss: float
    supervised_tokens: int
    unit: str = "nats per supervised token"
    metrics: Mapping[str, float] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """As `Event` says."""
        recorded = _unfolded(super().fields())
        del recorded["unit"]
        return recorded


def _unfolded(fields: dict[str, Any]) -> dict[str, Any]:
    metrics = fields.pop("metrics")
    return fields | metrics


@dataclass(frozen=True)
class StoppedEarly(Event):
    """Training ended because the held-out loss no longer fell after `best_step`; its unit is that of `HeldOutLoss`."""

    kind: ClassVar[str] = "early-stop"
    step: int
    best_step: int
    best_loss: float


@dataclass(frozen=True)
class OutOfMemory(Event):
    """A step is taken again.

    Args:
        micro_batch_size: rows at once from now on, where that is what changed.
        paged: the optimizer's state went to a file, where that is what changed.
        graphs: False where that is what changed: micro-batches no longer come from graphs.
    """

    kind: ClassVar[str] = "out-of-memory"
    step: int
    micro_batch_size: int | None = None
    paged: bool | None = None
    graphs: bool | None = None


@dataclass(frozen=True)
class NotPaged(Event):
    """The disk has no room for the optimizer's state."""

    kind: ClassVar[str] = "not-paged"
    reason: str


@dataclass(frozen=True)
class TrainingEnded(Event):
    """The last step is done, or the user interrupted; adapter and checkpoint are saved."""

    kind: ClassVar[str] = "end"
    steps: int
    interrupted: bool
    peak_memory_bytes: int


@dataclass(frozen=True)
class RunMeasured(Event):
    """What the run took beside what was predicted: bytes at the peak, seconds of a step and of all training; and the
    held-out losses before and after, None where there are none.
    """

    steps: int
    training_s: float
    peak_bytes: int
    predicted_peak_bytes: float
    step_s: float
    predicted_step_s: float
    loss_before: float | None = None
    loss_after: float | None = None
