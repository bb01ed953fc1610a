"""Figures in the documents are those of the records."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from figures import DOCUMENTS, RESULTS, figure, record, records_in, with_figures

COMMITS_SINCE = "2026-11-29"  # records say from then on which code they measured


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_say_what_the_records_say(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert with_figures(text) == text, "run: python benchmarks/figures.py"


@pytest.mark.parametrize(
    ("document", "section", "by_hand"),
    [("README.md", "## Four figures", []), ("docs/results.md", "## Speed", ["attention, forward and backward"])],
)
def test_tables_come_from_records(document: str, section: str, by_hand: list[str]) -> None:
    """So that a figure which is written by hand is noticed: each row of these tables has one, or none measured it."""
    text = (RESULTS.parent.parent / document).read_text(encoding="utf-8")
    rows = [line for line in text.partition(section)[2].partition("\n## ")[0].splitlines() if line[:2] == "| "]
    assert len(rows) > 4
    assert [row for row in rows[1:] if not records_in(row) and not row[2:].startswith(tuple(by_hand))] == []


def test_records_say_which_code_they_measured() -> None:
    used = set().union(*(records_in(document.read_text(encoding="utf-8")) for document in DOCUMENTS))
    assert used
    abouts = {name: record(name).get("about", {}) for name in used}
    assert [n for n, a in abouts.items() if a.get("date", "") >= COMMITS_SINCE and not a.get("commit")] == []


def test_figures_are_found_and_written(tmp_path: Path) -> None:
    table = {"caption": "", "columns": ["step", "ratio"], "rows": [["a: b", "1.5 (1 to 2)"], ["4096", "0.6"]]}
    content = {"tables": [table], "arms": {"nf4, x": {"kl": 0.12345}}}
    (tmp_path / "r.json").write_text(json.dumps(content))
    (tmp_path / "r.md").write_text("# Title\n\nbody\n")
    before = "x <!--r: a: b / ratio-->old<!----> and <!--r: arms / nf4, x / kl as .3f--><!---->\n"
    after = "x <!--r: a: b / ratio-->1.5 (1 to 2)<!----> and <!--r: arms / nf4, x / kl as .3f-->0.123<!---->\n"
    block = "<!--r.md-->\n{}<!--/r.md-->\n"
    assert with_figures(before + block.format("stale\n"), tmp_path) == after + block.format("body\n")
    assert records_in(before) == {"r"}
    assert figure(content, "4096 / ratio") == "0.6"
    with pytest.raises(LookupError):
        figure(content, "c / ratio")
    with pytest.raises(LookupError):
        with_figures("<!--gone: a / b--><!---->", tmp_path)
