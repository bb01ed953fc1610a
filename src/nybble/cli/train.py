"""`nybble train`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from nybble.errors import ConfigError
from nybble.options.verbs import draft_config, load_config
from nybble.runs.folder import RunFolder

NUM_SAMPLES = 3
SIGNAL_EXIT_CODE = 128  # plus the signal's number, as shells count it


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
    from nybble.cli.render import Terminal, training
    from nybble.evaluation.samples import compare_answers
    from nybble.training.session import train as run_training

    with Terminal() as terminal:
        trained = run_training(config, terminal)
    if trained.interrupted:
        training.show_interrupted(terminal, trained)
        return SIGNAL_EXIT_CODE + trained.interrupted
    # Where the base is streamed, an answer would read all of it for every token.
    rows = [] if trained.streamed else trained.held_out[:NUM_SAMPLES]
    samples = compare_answers(trained.model, trained.template, rows) if rows else []
    training.show_result(terminal, trained, samples)
    return 0


def _config_of_run(given: dict[str, Any]) -> Path:
    """The options that the run in `--out` began with."""
    if "out" not in given:
        raise ConfigError("--resume needs the folder of the run.", "out: the run folder.", "Add --out RUN.")
    run = RunFolder(Path(given["out"]))
    run.check_resumable()
    return run.config
