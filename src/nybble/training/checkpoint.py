"""Checkpoints: all that a run needs to go on as if it had never stopped.

`checkpoints/step-N/` holds the adapter in PEFT's format, or every weight where they are trained, the optimizer's state,
the random generators, the position in the data, and the options in effect. It is written as `.tmp-step-N`: every file
flushed to the disk, then the manifest (formats.manifest), then the folder; only then is it renamed, and the parent
flushed. So a crash leaves the folder complete or not there. A failed flush ends the run: what the system could not
write, it may have dropped. Older checkpoints go only after the new one has been read back and found right.

Checkpoints lie between optimizer steps. Gradients of a half accumulated step are never saved: on a signal the step is
finished first, and after a kill it is computed again, from the same rows and random numbers.
"""

import json
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nybble.data.sampler import StepSampler
from nybble.errors import FormatError, NybbleError, RunError
from nybble.events import Listener, Note, silent
from nybble.files.disk import TEMPORARY, complete_folder, reason_of, remove_folder
from nybble.files.manifest import verify_manifest, write_manifest
from nybble.formats.safetensors import SafetensorsFolder, write_tensors
from nybble.runs.trained import Trained
from nybble.training.optimizer import AdamW
from nybble.training.rng import RngState, capture_rng, restore_rng
from nybble.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPTIMIZER, RNG, STATE, CONFIG = "optimizer.safetensors", "rng.safetensors", "state.json", "config.yaml"
OVERHEAD_BYTES = 1_000_000  # of a checkpoint beside the adapter and its moments, generously
_STEP = re.compile(r"step-(\d+)")


@dataclass
class Progress:
    """How far a run is, and what it knows so far.

    Args:
        step: optimizer steps taken.
        micro_batch_size: rows computed at once; smaller than planned once memory ran out.
        loss_before, loss_after: held-out losses before the first step and at the last evaluation, None before it.
        evaluated_step: step of the last evaluation, None before the first.
        best_loss, best_step: lowest held-out loss, and after which step.
        evaluations_since: how many there were after that one.
    """

    step: int
    micro_batch_size: int
    loss_before: float | None = None
    loss_after: float | None = None
    evaluated_step: int | None = None
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_since: int = 0

    def evaluated(self, loss: float) -> bool:
        """Take down a held-out loss; whether it is the lowest so far."""
        if self.step == 0:
            self.loss_before = loss
        self.loss_after, self.evaluated_step = loss, self.step
        if self.best_loss is not None and not loss < self.best_loss:
            self.evaluations_since += 1
            return False
        self.best_loss, self.best_step, self.evaluations_since = loss, self.step, 0
        return True


@dataclass(frozen=True)
class Position:
    """A place between two steps: from here the same steps follow, drawing the same rows and random numbers."""

    progress: Progress
    sampler: dict[str, int]
    rng: RngState

    @classmethod
    def now(cls, progress: Progress, sampler: StepSampler, device: torch.device) -> "Position":
        return cls(replace(progress), sampler.state(), capture_rng(device))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose bytes were verified.

    Args:
        about: "base" and "data", the hashes of what it belongs to, and "evaluated_rows", how many.
        state: the content of its state.json.
    """

    folder: Path
    about: dict[str, Any]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["progress"]["step"])

    def restore(
        self,
        model: "PreTrainedModel",
        optimizer: AdamW,
        trained: Trained,
        sampler: StepSampler,
        device: torch.device,
    ) -> Progress:
        """Put what is trained, optimizer, sampler and random generators where they were.

        Raises:
            RunError: what is trained, or the optimizer's state, has another shape than the model's.
        """
        trained.restore(model, self.folder)
        stored = SafetensorsFolder(self.folder / OPTIMIZER)
        try:
            optimizer.load_state(stored.read)
        except NybbleError:
            raise  # it could not be read
        except (KeyError, ValueError) as error:
            raise RunError(
                f"The optimizer's state in {self.folder} does not fit what is trained: {error}.",
                "Allowed: the same base, and the same adapters or weights.",
                "Start a new run.",
            ) from error
        sampler.load_state(self.state["sampler"])
        restore_rng(RngState(load_file(self.folder / RNG), self.state["rng"]), device)
        return Progress(**self.state["progress"])


class Checkpoints:
    """Saves a run's checkpoints and removes the old ones.

    Args:
        folder: that holds them.
        save_every: steps between them, or minutes with an "m" behind.
        keep: how many of them stay.
        config: text of the options in effect.
        about: "base" and "data", the hashes of what they belong to, and "evaluated_rows", how many.
        settled: names of options -> what was chosen for those that choose for themselves.
        last_step: of the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        folder: Path,
        *,
        save_every: str,
        keep: int,
        config: str,
        about: Mapping[str, Any],
        settled: Mapping[str, Any],
        last_step: int | None = None,
    ):
        self.folder, self.keep, self.last_step = folder, keep, last_step
        self._config, self._about, self._settled = config, about, settled
        self._minutes = float(save_every[:-1]) if save_every.endswith("m") else None
        self._steps = 0 if self._minutes is not None else int(save_every)
        self._last_time = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether the interval is over at the end of `step`."""
        if self._minutes is None:
            return step % self._steps == 0
        return time.monotonic() - self._last_time >= 60 * self._minutes

    def check_space(self, trained_parameters: int) -> None:
        """Refuse to start a run whose checkpoints would not fit on the disk.

        Raises:
            RunError: says what is needed and what is free.
        """
        # fp32 weights and two moments; one more checkpoint than is kept while the newest is written, and the result
        needed = (self.keep + 1) * (12 * trained_parameters + OVERHEAD_BYTES) + 4 * trained_parameters
        free = shutil.disk_usage(self.folder.parent).free
        if free < needed:
            raise RunError(
                f"{self.folder.parent} is on a disk with {format_bytes(free)} free.",
                f"Checkpoints of this run need {format_bytes(needed)} ({self.keep} kept, one being written).",
                "Make room, choose an --out on another disk, or lower --keep-checkpoints or --rank.",
            )

    def save(
        self,
        position: Position,
        model: "PreTrainedModel",
        optimizer: AdamW,
        trained: Trained,
        events_bytes: int,
    ) -> Path:
        """Write the checkpoint of `position`, read it back, then remove those beyond `keep`; returns its folder.

        Raises:
            RunError: it could not be written and verified. Earlier ones are untouched.
        """
        step = position.progress.step
        folder = self.folder / f"step-{step}"
        if step == self.last_step:
            return folder
        try:
            with complete_folder(folder, partial(write_manifest, about={**self._about, "step": step})) as temporary:
                self._write(temporary, position, model, optimizer, trained, events_bytes)
            verify_manifest(folder)
            self._remove_older(step)
        except (OSError, SafetensorError, FormatError) as error:
            raise self._not_saved(step, error) from error
        self.last_step, self._last_time = step, time.monotonic()
        return folder

    def rehearse(self, position: Position, model: "PreTrainedModel", optimizer: AdamW, trained: Trained) -> None:
        """Write the files of a checkpoint, and remove them again.

        Raises:
            RunError: they could not be written.
        """
        self.folder.mkdir(exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=TEMPORARY) as temporary:
                self._write(Path(temporary), position, model, optimizer, trained, events_bytes=0)
        except (OSError, SafetensorError) as error:
            raise self._not_saved(position.progress.step, error) from error

    def _write(
        self,
        folder: Path,
        position: Position,
        model: "PreTrainedModel",
        optimizer: AdamW,
        trained: Trained,
        events_bytes: int,
    ) -> None:
        state = {
            "progress": asdict(position.progress),
            "sampler": position.sampler,
            "rng": position.rng.numbers,
            "settled": {**self._settled, "micro_batch_size": position.progress.micro_batch_size},
            "events_bytes": events_bytes,
        }
        trained.write(model, folder)
        write_tensors(folder / OPTIMIZER, optimizer.layout(), optimizer.tensors())
        save_file(position.rng.tensors, folder / RNG)
        (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
        (folder / CONFIG).write_text(self._config, encoding="utf-8")

    def _remove_older(self, step: int) -> None:
        older = [path for number, path in step_folders(self.folder) if number < step]
        for path in older[self.keep - 1 :]:
            remove_folder(path)

    def _not_saved(self, step: int, error: Exception) -> RunError:
        last = "There is no earlier one" if self.last_step is None else f"The last good one is step-{self.last_step}"
        return RunError(
            f"The checkpoint of step {step} could not be saved in {self.folder}: {reason_of(error)}.",
            f"Checkpoints must be written, flushed and read back without an error. {last}.",
            "Make room or mend the disk, then go on with `nybble train --resume --out ...`.",
        )


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in `folder`, newest first, whatever their state."""
    named = ((_STEP.fullmatch(path.name), path) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(((int(match[1]), path) for match, path in named if match), reverse=True)


def newest_checkpoint(folder: Path, report: Listener = silent) -> Checkpoint | None:
    """The newest checkpoint in `folder` that verifies; None where there is none at all.

    Args:
        report: told of each newer one that does not verify.

    Raises:
        RunError: there are checkpoints, and none verifies.
    """
    damaged = []
    for step, path in step_folders(folder):
        try:
            about = verify_manifest(path)
            if about.get("step") != step:
                raise FormatError(f"{path} holds step {about.get('step')}.")
        except FormatError as error:
            damaged.append(error.got)
            report(Note(f"Passed over: {error.got}", warning=True))
            continue
        return Checkpoint(path, about, json.loads((path / STATE).read_text(encoding="utf-8")))
    if damaged:
        raise RunError(
            f"No checkpoint in {folder} is whole.\n" + "\n".join(damaged),
            "A run goes on from a checkpoint that is as it was written.",
            "Restore one from a copy, or start anew with --overwrite instead of --resume.",
        )
    return None
