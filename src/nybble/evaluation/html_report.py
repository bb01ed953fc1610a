"""`report.html`: the evaluation as one page that needs nothing beside it; pictures are inside."""

import base64
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment

from nybble.pictures import picture
from nybble.runs.open_run import OpenRun
from nybble.training.plots import draw_loss

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ report.run }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { border: 1px solid #ccc; padding: .3rem .6rem; }
td { text-align: right; vertical-align: top } td:first-child, .text td { text-align: left }
img { max-width: 100% } pre { white-space: pre-wrap; margin: 0; font: 14px/1.4 ui-monospace, monospace }
</style></head><body>
<h1>{{ report.run }}</h1>
<p>Base: {{ report.base }}. {{ report.rows }} held-out rows, {{ report.supervised_tokens }} supervised tokens.
In brackets: 95 % confidence intervals, rows drawn again 2000 times; differences are paired.</p>
{% for note in notes %}<p>{{ note }}</p>{% endfor %}
<table><tr><th>model</th><th>loss, nats a token</th><th>perplexity</th><th>tuned minus this</th>
<th>KL to the 16-bit base on general text</th>{% for metric in metrics %}<th>{{ metric }}</th>{% endfor %}</tr>
{% for name, arm in report.arms.items() %}<tr><td>{{ name }}</td><td>{{ interval(arm.loss, '%.4f') }}</td>
<td>{{ '%.3f' % arm.perplexity }}</td>
<td>{% if name in report.loss_change %}{{ interval(report.loss_change[name], '%+.4f') }}{% endif %}</td>
<td>{% if arm.kl_general_text is not none %}{{ '%.4f' % arm.kl_general_text }}{% endif %}</td>
{% for metric in metrics %}<td>{% if metric in arm.scores %}{{ interval(arm.scores[metric], '%.3f') }}{% endif %}</td>
{% endfor %}</tr>{% endfor %}</table>
{% for title, found in (('Preferences', report.preferences), ('Distillation', report.distillation)) if found %}
<h2>{{ title }}, {{ found.objective }}</h2>
<p>{{ found.rows }} held-out rows. KL of the tuned model from its base on their answers:
{{ interval(found.kl, '%.4f') }} nats a token.</p>
<table><tr><th></th><th>base, as trained on</th><th>tuned</th></tr>
<tr><td>loss</td><td>{{ '%.4f' % found.base.loss }}</td><td>{{ '%.4f' % found.tuned.loss }}</td></tr>
{% for name, value in found.tuned.metrics.items() %}<tr><td>{{ name }}</td>
<td>{{ '%.4f' % found.base.metrics[name] }}</td><td>{{ '%.4f' % value }}</td></tr>{% endfor %}</table>
{% endfor %}{% if report.lm_eval %}<h2>Benchmarks</h2><pre>{{ report.lm_eval | tojson(indent=2) }}</pre>{% endif %}
{% for title, picture in pictures.items() %}<h2>{{ title }}</h2>
<img alt="{{ title }}" src="data:image/png;base64,{{ picture }}">{% endfor %}
{% for title, rows in (('Rows that gained most', report.best_rows), ('Rows that gained least', report.worst_rows),
('Answers', report.samples)) if rows %}<h2>{{ title }}</h2>
{% for row in rows %}<table class="text">
<tr><td>{{ row.origin }}</td><td>loss a token {{ '%+.4f' % row.loss_change }}</td></tr>
<tr><td>prompt</td><td><pre>{{ row.prompt }}</pre></td></tr>
<tr><td>reference</td><td><pre>{{ row.reference }}</pre></td></tr>
{% for name, answer in row.answers.items() %}<tr><td>{{ name }}</td><td><pre>{{ answer }}</pre></td></tr>{% endfor %}
</table>{% endfor %}{% endfor %}
</body></html>
"""


def write_html(opened: OpenRun, report: dict[str, Any], row_change: np.ndarray, out: Path) -> None:
    """Write the page; `report` is the contents of report.json, `row_change` the change of each row's loss a token."""
    drawn = {"Losses of the run": partial(draw_loss, opened.run.events)} if opened.run.events.is_file() else {}
    drawn["Change of each row's loss"] = partial(_draw_changes, row_change)
    drawn["Loss by length of the row"] = partial(_draw_buckets, report["length_buckets"])
    metrics = list(dict.fromkeys(metric for arm in report["arms"].values() for metric in arm["scores"]))
    page = Environment(autoescape=True).from_string(PAGE)
    text = page.render(
        report=report,
        pictures={title: _encoded(draw) for title, draw in drawn.items()},
        metrics=metrics,
        notes=opened.source.notes,
        interval=lambda e, form: f"{form % e['value']} [{form % e['low']}, {form % e['high']}]",
    )
    out.write_text(text, encoding="utf-8")


def _draw_changes(changes: np.ndarray, out: io.BytesIO) -> None:
    with picture(out, "held-out rows, best first", "tuned minus base, nats a token", (7, 3.5)) as axes:
        ordered = sorted(changes)
        axes.bar(range(len(ordered)), ordered, width=1.0, color=["tab:green" if c < 0 else "tab:red" for c in ordered])
        axes.axhline(0, color="black", linewidth=0.8)


def _draw_buckets(buckets: list[dict[str, float]], out: io.BytesIO) -> None:
    with picture(out, "tokens in the row", "loss, nats a token", (7, 3.5)) as axes:
        for offset, name in ((-0.2, "base"), (0.2, "tuned")):
            heights = [bucket[name] for bucket in buckets]
            axes.bar([i + offset for i in range(len(buckets))], heights, width=0.4, label=name)
        labels = [f"{bucket['shortest']:.0f} to {bucket['longest']:.0f}" for bucket in buckets]
        axes.set_xticks(range(len(buckets)), labels)
        axes.legend()


def _encoded(draw: Callable[[io.BytesIO], None]) -> str:
    """A picture as text within the page."""
    out = io.BytesIO()
    draw(out)
    return base64.b64encode(out.getvalue()).decode()
