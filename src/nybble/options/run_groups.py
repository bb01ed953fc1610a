"""The group of a training run itself: where it lies, how it is gone on with, who is told of it."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, model_validator

from nybble.errors import ConfigError
from nybble.options.option import Folder, Name, Options, knob, split_names

Tracker = Literal["trackio", "tensorboard", "wandb", "mlflow"]


class RunOptions(Options, group="Run"):
    out: Folder = knob(..., "Run folder to make.", aliases=("output_dir", "run_dir"))
    overwrite: bool = knob(False, "Replace an earlier run in that folder.", aliases=("overwrite_output_dir",))
    resume: bool = knob(
        False, "Go on with the run in --out from its newest whole checkpoint.", aliases=("resume_from_checkpoint",)
    )
    allow_change: Annotated[tuple[Literal["base", "data", "config"], ...], BeforeValidator(split_names)] = knob(
        (), "With --resume or --adapter: what may differ from what the run, or the adapter, began with."
    )
    track: Annotated[tuple[Tracker, ...], BeforeValidator(split_names)] = knob(
        (),
        "Trackers to hand the run's options and figures to: trackio (local), tensorboard, wandb, mlflow. Each is a "
        "package of its own; one that fails stops nothing.",
        aliases=("report_to", "tracker"),
    )
    track_project: Name | None = knob(
        None,
        "Project, or experiment, that trackers file the run under; that of the tracker's own environment variable, "
        "else nybble, if not given.",
        aliases=("project", "wandb_project"),
    )

    @model_validator(mode="after")
    def _a_project_is_of_trackers(self) -> Self:
        if self.track_project is not None and not self.track:
            raise ConfigError(
                f"track-project is {self.track_project!r}, and no tracker is named.",
                "A project is what trackers file a run under.",
                "Add --track trackio, or leave --track-project out.",
            )
        return self
