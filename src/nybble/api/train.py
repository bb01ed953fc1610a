"""`nybble.train`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.api.keywords import as_options
from nybble.errors import ConfigError
from nybble.events import Listener, silent
from nybble.network import fetching
from nybble.options.verbs import load_config
from nybble.runs.folder import RunFolder

if TYPE_CHECKING:
    from nybble.runs.result import RunResult


def train(config: Path | str | None = None, *, on_event: Listener = silent, **options: Any) -> "RunResult":
    """Fine-tune a model on examples: its frozen weights in four bits, adapters trained beside them.

    Args:
        config: a YAML file of options, named as the flags are; keywords win over it.
        on_event: told what happens, as it happens.
        options: the flags of `nybble train` with underscores. `model`, `data` and `out` are needed.

    Returns:
        The run: losses in nats a supervised token before and after, the adapter's folder, the model in memory. After
        Ctrl-C too, with what was trained until then.

    Raises:
        NybbleError: anything the user can mend. An earlier run's folder is untouched unless training began.

    Example:
        >>> run = nybble.train(model=tiny, data="rows.jsonl", out="runs/first", rank=4, max_steps=2, lr=5e-3)
        >>> run.steps, run.adapter.name, run.loss_after < run.loss_before
        (2, 'adapter', True)
    """
    given = as_options(options)
    if given.get("resume") and config is None:
        config = _config_of_run(given)
    settled = load_config(config, given)
    with RunFolder(settled.run.out).locked():  # before the seconds of importing: another process may be at work there
        pass
    from nybble.training.session import train as run_training

    with fetching(not settled.model.offline):
        return run_training(settled, on_event)


def _config_of_run(given: dict[str, Any]) -> Path:
    """The options that the run in `out` began with."""
    if "out" not in given:
        raise ConfigError("--resume needs the folder of the run.", "out: the run folder.", "Add --out RUN.")
    run = RunFolder(Path(given["out"]))
    run.check_resumable()
    return run.config
