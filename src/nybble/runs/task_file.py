"""`task.json` of a run: which head stands on its model, and what its scores are of."""

import json

from nybble.errors import RunError
from nybble.runs.folder import RunFolder
from nybble.sources.task import Task


def read_task(run: RunFolder) -> Task | None:
    """What the run's file says; None where there is none, as of a language model.

    Raises:
        RunError: it is damaged.
    """
    if not run.task.is_file():
        return None
    try:
        return Task.of_json(json.loads(run.task.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{run.task} is damaged: {error!r}.", "", "Restore it, or train again.") from error


def task_text(task: Task) -> str:
    """The text of the file."""
    return json.dumps(task.to_json(), indent=2) + "\n"
