"""`nybble data check`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import nybble
from nybble.cli.lazy_terminal import LazyTerminal, plot_errors


def check(
    given: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Print the audit as one JSON object, for machines.")] = False,
    show: Annotated[int, typer.Option(min=0, metavar="N", help="Rows to show, supervised tokens coloured.")] = 3,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw a histogram of the sequences' lengths.")
    ] = None,
) -> int:
    """Show what a training run would learn from: the audit, and rows with their supervised tokens coloured."""
    with LazyTerminal() as listener:
        data = nybble.check_data(on_event=listener, **given)
    from nybble.cli.render.audit import render_example
    from nybble.data.audit import Audited
    from nybble.data.picture_rows import PictureTemplate
    from nybble.data.plots import draw_lengths

    if as_json:
        typer.echo(json.dumps(data.audit.to_json(), indent=2))
    else:
        listener(Audited(data.audit))
        for row in () if isinstance(data.template, PictureTemplate) else data.train[:show]:
            listener.terminal.console.print(render_example(row, data.template.tokenizer))
    if plot is not None:
        with plot_errors(plot):
            draw_lengths(data.lengths(), data.audit.max_seq_len, plot)
    data.audit.check()  # what would stop a training run stops this verb too, after it was shown
    return 0
