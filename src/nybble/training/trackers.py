"""The trackers that a run's figures may go to: Trackio, TensorBoard, Weights & Biases, MLflow.

Each is a class of four calls over the tracker's own library, which is imported when the tracker is made. What they are
told, and what happens where one fails, is in tracking.py.
"""

import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from nybble.errors import ConfigError, first_line, foreign_errors
from nybble.options.option import yaml_key

PROJECT = "nybble"  # where neither an option nor the tracker's own variable says one
FINISH_S = 60  # in which a tracker must have taken what is left


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run before its first figure.

    Args:
        folder: of the run; its name is the run's.
        id: of all trackers' runs for this folder; one that is gone on with has kept it.
        project: that the run is filed under; None leaves that to the tracker's own environment variable.
        options: of the run, as they are settled.
        after: the step that the run goes on after; None at its beginning.
    """

    folder: Path
    id: str
    project: str | None
    options: Mapping[str, Any]
    after: int | None

    @property
    def name(self) -> str:
        return self.folder.absolute().name

    def project_or(self, variable: str) -> str:
        return self.project or os.environ.get(variable) or PROJECT


class Tracker(Protocol):
    """A tracker of one run. Making it imports the library; from `begin` on it may raise whatever that raises."""

    def place(self, run: TrackedRun) -> str:
        """Where its user finds the run."""

    def begin(self, run: TrackedRun) -> None:
        """Open the tracker's run, or go on with it."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Record figures of a step; a run that is gone on with may say one again."""

    def end(self, figures: Mapping[str, float], step: int, status: str) -> None:
        """Record what came out, and close the tracker's run; `status` is finished, interrupted or failed."""


class Trackio:
    """On this machine, under TRACKIO_DIR, unless Trackio's own variables name a Space or a server."""

    VARIABLE = "TRACKIO_PROJECT"

    def __init__(self) -> None:
        import trackio

        self._trackio = trackio

    def place(self, run: TrackedRun) -> str:
        return f"run {self._name(run)}, trackio show --project {shlex.quote(run.project_or(self.VARIABLE))}"

    def _name(self, run: TrackedRun) -> str:
        """A run is found again by its name alone, and several folders may have one name."""
        return f"{run.name}-{run.id[:6]}"

    def begin(self, run: TrackedRun) -> None:
        resume = "never" if run.after is None else "allow"
        project, options = run.project_or(self.VARIABLE), dict(run.options)
        self._run = self._trackio.init(project, self._name(run), config=options, resume=resume, embed=False)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def end(self, figures: Mapping[str, float], step: int, status: str) -> None:
        self._run.log({**figures, "status": status}, step=step)
        self._run.finish()


class TensorBoard:
    """Event files in `tensorboard/` of the run folder. A run that is gone on with hides the steps that it repeats."""

    FOLDER = "tensorboard"

    def __init__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make = SummaryWriter

    def place(self, run: TrackedRun) -> str:
        return f"tensorboard --logdir {shlex.quote(str(run.folder / self.FOLDER))}"

    def begin(self, run: TrackedRun) -> None:
        repeated = None if run.after is None else run.after + 1
        self._writer = self._make(run.folder / self.FOLDER, purge_step=repeated, flush_secs=10)
        lines = (f"    {yaml_key(name)}: {value}" for name, value in run.options.items())  # Markdown: as it is
        self._writer.add_text("options", "\n".join(lines), run.after or 0)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, figure in figures.items():
            self._writer.add_scalar(name, figure, step)

    def end(self, figures: Mapping[str, float], step: int, status: str) -> None:
        self.log(figures, step)
        self._writer.add_text("status", status, step)
        self._writer.close()


class Wandb:
    """Figures and options; nothing that is printed, no code and no state of a repository.

    Steps are an axis of their own: W&B's counter takes no step twice, and a run that is gone on with repeats some.
    """

    VARIABLE = "WANDB_PROJECT"

    def __init__(self) -> None:
        import wandb

        self._wandb = wandb
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise ConfigError(  # it would ask in the middle of the run
                "track is wandb, and W&B has no key here.",
                "Needed: a key, or a run that is kept on this machine until `wandb sync`.",
                "Run `wandb login` or set WANDB_API_KEY; or set WANDB_MODE=offline.",
            )

    def place(self, run: TrackedRun) -> str:
        return f"run {run.name} of project {run.project_or(self.VARIABLE)}"

    def begin(self, run: TrackedRun) -> None:
        settings = self._wandb.Settings(
            console="off", save_code=False, disable_git=True, finish_timeout=FINISH_S, finish_timeout_raises=True
        )
        self._run = self._wandb.init(
            project=run.project_or(self.VARIABLE),
            name=run.name,
            id=run.id,
            resume="allow",
            config=dict(run.options),
            allow_val_change=True,  # of options that may change when a run is gone on with
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log({**figures, "step": step})

    def end(self, figures: Mapping[str, float], step: int, status: str) -> None:
        self._run.summary.update({**figures, "status": status})
        self._run.finish(exit_code=int(status == "failed"))


class Mlflow:
    """At MLFLOW_TRACKING_URI, under an experiment; the run is found again by its tag `nybble.id`."""

    VARIABLE = "MLFLOW_EXPERIMENT_NAME"
    STATUS: ClassVar = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
    AT_ONCE = 100  # parameters in one request

    def __init__(self) -> None:
        import mlflow
        from mlflow.entities import Metric, Param

        self._client, self._metric, self._param = mlflow.MlflowClient(), Metric, Param

    def place(self, run: TrackedRun) -> str:
        return f"run {run.name} of experiment {run.project_or(self.VARIABLE)}"

    def begin(self, run: TrackedRun) -> None:
        client, experiment = self._client, run.project_or(self.VARIABLE)
        found = client.get_experiment_by_name(experiment)
        number = client.create_experiment(experiment) if found is None else found.experiment_id
        earlier = client.search_runs([number], f"tags.`nybble.id` = '{run.id}'")
        if earlier:  # its parameters cannot be said again
            self._run_id = earlier[0].info.run_id
            client.update_run(self._run_id, status="RUNNING")
            return
        self._run_id = client.create_run(number, tags={"nybble.id": run.id}, run_name=run.name).info.run_id
        params = [self._param(name, str(value)) for name, value in run.options.items()]
        for start in range(0, len(params), self.AT_ONCE):
            client.log_batch(self._run_id, params=params[start : start + self.AT_ONCE])

    def log(self, figures: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, figure, now, step) for name, figure in figures.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def end(self, figures: Mapping[str, float], step: int, status: str) -> None:
        self.log(figures, step)
        self._client.set_terminated(self._run_id, self.STATUS[status])


TRACKERS: Mapping[str, type[Tracker]] = {
    "trackio": Trackio,
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
}


def make_tracker(name: str) -> Tracker:
    """The tracker of one of these names.

    Raises:
        ConfigError: its library is missing or cannot be used.
    """

    def unusable(error: Exception) -> ConfigError:  # a library beside others of the wrong version raises anything
        missing = isinstance(error, ImportError)
        fix = f"Run `pip install {name}`, nybble's extra of that name" if missing else "Mend what it names"
        return ConfigError(
            f"track is {name}, which cannot be used: {type(error).__name__}: {first_line(error).rstrip('.')}.",
            f"Trackers: {', '.join(TRACKERS)}, each with a package of its own.",
            f"{fix}, or leave --track out.",
        )

    with foreign_errors(unusable):
        return TRACKERS[name]()
