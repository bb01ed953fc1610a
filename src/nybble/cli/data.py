"""`nybble data check`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from nybble.errors import ConfigError
from nybble.options.option import build_options, with_options
from nybble.options.verbs import DataConfig


def check(
    given: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Print the audit as one JSON object, for machines.")] = False,
    show: Annotated[int, typer.Option(min=0, metavar="N", help="Rows to show, supervised tokens coloured.")] = 3,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw a histogram of the sequences' lengths.")
    ] = None,
) -> int:
    """Show what a training run would learn from: the audit, and rows with their supervised tokens coloured."""
    config = build_options(DataConfig, given)
    from nybble.cli.render import Terminal, audit
    from nybble.data.audit import Audited
    from nybble.data.plots import draw_lengths
    from nybble.data.template import open_template
    from nybble.runs.context import read_rows, within_context
    from nybble.sources.open import open_model

    terminal = Terminal()
    source = open_model(config.model.model, config.model.tokenizer, terminal)
    options = with_options(config, max_seq_len=within_context(config.data.max_seq_len, source)).data
    template = open_template(options, source.load_tokenizer())
    data = read_rows(options, source, template)
    if as_json:
        typer.echo(json.dumps(data.audit.to_json(), indent=2))
    else:
        terminal(Audited(data.audit))
        for row in data.train[:show]:
            terminal.console.print(audit.render_example(row, template.tokenizer))
    if plot is not None:
        try:
            draw_lengths(data.lengths(), options.max_seq_len, plot)
        except (OSError, ValueError) as error:  # a suffix that is no picture's raises ValueError
            raise ConfigError(
                f"{plot} cannot be drawn: {error}.", "--plot takes a file such as lengths.png."
            ) from error
    data.audit.check()  # what would stop a training run stops this verb too, after it was shown
    return 0
