"""The report and the card of a run that gives something of whole texts: figures, tables, pictures."""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from jinja2 import Environment

from nybble.errors import ConfigError, RunError
from nybble.evaluation.model_card import card_head
from nybble.evaluation.scores import Estimate
from nybble.events import Listener, Note
from nybble.files.disk import disk_errors
from nybble.options.verbs import EvalConfig
from nybble.runs.open_run import OpenRun
from nybble.training.plots import draw_loss

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ run }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { border: 1px solid #ccc; padding: .3rem .6rem; }
td { text-align: right } td:first-child { text-align: left } img { max-width: 100% }
</style></head><body>
<h1>{{ run }}</h1>
<p>Base: {{ base }}. {{ found.what }}. In brackets: 95 % confidence intervals, rows drawn again 2000 times.</p>
<table>{% for name, value in found.figures.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}
</table>
{% for table in found.tables if table.rows %}{% if table.title %}<h2>{{ table.title }}</h2>{% endif %}
<table><tr>{% for name in table.columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>{% endfor %}
{% for title, picture in pictures.items() %}<h2>{{ title }}</h2>
<img alt="{{ title }}" src="data:image/png;base64,{{ picture }}">{% endfor %}
</body></html>
"""
Draw = Callable[[Path | BinaryIO], None]


class Table(NamedTuple):
    """Rows of cells; on the card too, unless they are texts of the user's."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    on_card: bool = False


class Picture(NamedTuple):
    """A picture, and the name of its file in the report's folder."""

    title: str
    file: str
    draw: Draw


@dataclass(frozen=True)
class Findings:
    """What held-out rows say.

    Args:
        what: was judged, and how many of them.
        figures: by name, in words.
        json: what report.json holds beside all that.
    """

    what: str
    figures: Mapping[str, str]
    tables: Sequence[Table]
    pictures: Sequence[Picture]
    json: Mapping[str, Any]


def check_no_answers(opened: OpenRun, config: EvalConfig) -> None:
    """Refuse what is asked of language models.

    Raises:
        ConfigError: an option is given that is for answers.
    """
    if unused := sorted(config.evaluation.model_fields_set & {"metric", "answers", "lm_eval"}):
        raise ConfigError(
            f"{unused[0].replace('_', '-')} is given, and the run is {opened.source.task.words}.",
            "It is for answers of language models.",
            f"Leave --{unused[0].replace('_', '-')} out.",
        )


def write_findings(opened: OpenRun, found: Findings, report: Listener) -> None:
    """Write the run's report, and the README.md of its adapter."""
    folder, about = opened.run.report, {"run": str(opened.run.path), "base": opened.source.name}
    with disk_errors(folder, RunError, "The report is not complete."):
        folder.mkdir(exist_ok=True)
        told = {**about, "figures": found.figures, **found.json}
        (folder / "report.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        for each in found.pictures:
            each.draw(folder / each.file)
        pictures = {each.title: _encoded(each.draw) for each in found.pictures}
        if opened.run.events.is_file():
            pictures["Losses of the run"] = _encoded(partial(draw_loss, opened.run.events))
        page = Environment(autoescape=True).from_string(PAGE)
        (folder / "report.html").write_text(page.render(**about, found=found, pictures=pictures), encoding="utf-8")
        card = card_head(opened) + "## Results\n\n" + _results(found)
        (opened.run.adapter / "README.md").write_text(card, encoding="utf-8")
    report(Note(f"report: {folder / 'report.html'}\ncard:   {opened.run.adapter / 'README.md'}"))


def in_words(estimate: Estimate) -> str:
    """A figure with its interval."""
    return f"{estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"


def _results(found: Findings) -> str:
    """Markdown."""
    lines = [f"{found.what}.", "", "| | |", "|---|---|", *map(_line, found.figures.items())]
    for table in found.tables:
        if table.on_card and table.rows:
            lines += ["", _line(table.columns), "|" + "---|" * len(table.columns), *map(_line, table.rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    """Of a Markdown table; a name may have the sign that parts cells, or a new line."""
    written = (" ".join(cell.split()).replace("|", r"\|") for cell in cells)
    return f"| {' | '.join(written)} |"


def _encoded(draw: Draw) -> str:
    out = io.BytesIO()
    draw(out)
    return base64.b64encode(out.getvalue()).decode()
