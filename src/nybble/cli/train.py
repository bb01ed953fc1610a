"""`nybble train`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nybble.errors import ConfigError
from nybble.options.verbs import draft_config, load_config
from nybble.runs.folder import RunFolder


def train(
    given: dict[str, Any],
    config_file: Annotated[
        Path | None, typer.Argument(metavar="FILE.yaml", help="Options, named as the flags are; flags win over it.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all options with comments as YAML, and stop.")
    ] = False,
) -> int:
    """Fine-tune a model on examples: four-bit frozen weights, trained adapters."""
    if print_config:
        typer.echo(draft_config(config_file, given), nl=False)
        return 0
    if given.get("resume") and config_file is None:
        config_file = _config_of_run(given)
    config = load_config(config_file, given)
    with RunFolder(config.out).locked():  # before the seconds of importing: another process may be at work there
        pass
    from nybble.evaluation.report import show_result
    from nybble.training.session import train as run_training

    console = Console()
    return show_result(run_training(config, console), console)


def _config_of_run(given: dict[str, Any]) -> Path:
    """The options that the run in `--out` began with."""
    if "out" not in given:
        raise ConfigError("--resume needs the folder of the run.", "out: the run folder.", "Add --out RUN.")
    run = RunFolder(Path(given["out"]))
    run.check_resumable()
    return run.config
