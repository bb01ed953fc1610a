"""Figures in the documents that come from a record in benchmarks/results: writes them anew from the records.

    <!--gemm-limit: 135M: keeping everything / times the products-->1.78 (1.70 to 1.79)<!---->

In front of a figure stands which record it is from and the way to it: a row (by its first cell) and a column of one of
the record's tables, or keys of its JSON; then, where a number is rounded, ` as ` and Python's format for it.
`<!--plan.md-->` ... `<!--/plan.md-->` holds all of a record's Markdown but its heading. Run it after measuring; a test
compares.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "lab-notes.md"))
FIGURE = re.compile(r"(<!--([a-z0-9-]+): (.+?)-->)(.*?)(<!---->)")
ROUNDED = re.compile(r"(.+) as (,?\.\d+[f%])")
BLOCK = re.compile(r"(<!--([a-z0-9-]+\.md)-->\n)(.*?)(<!--/\2-->)", re.DOTALL)


def with_figures(text: str, results: Path = RESULTS) -> str:
    """A document with every figure and block as the records have it.

    Raises:
        LookupError: a record, or the way through it, is not there.
    """
    text = FIGURE.sub(lambda m: m[1] + figure(record(m[2], results), m[3]) + m[5], text)
    return BLOCK.sub(lambda m: m[1] + _body(results / m[2]) + m[4], text)


def record(name: str, results: Path = RESULTS) -> dict[str, Any]:
    """A record by its name."""
    file = results / f"{name}.json"
    if not file.is_file():
        raise LookupError(f"there is no record {file}")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def figure(content: dict[str, Any], way: str) -> str:
    """What lies at the end of a way: `row / column`, or `key / key / ... as format`."""
    rounded = ROUNDED.fullmatch(way)
    way, rounding = rounded.groups() if rounded else (way, "")
    first, *rest = way.split(" / ")
    found: Any = content
    if first in content:
        for key in (first, *rest):
            found = found[int(key)] if isinstance(found, list) else found[key]
    else:
        found = _cell(content, first, *rest)
    return format(found, rounding)


def records_in(text: str) -> set[str]:
    """Names of the records that a document's figures come from."""
    return {m[2] for m in FIGURE.finditer(text)} | {m[2].removesuffix(".md") for m in BLOCK.finditer(text)}


def _cell(content: dict[str, Any], row: str, column: str) -> str:
    cells = [
        cells[table["columns"].index(column)]
        for table in content.get("tables", ())
        for cells in table["rows"]
        if cells[0] == row and column in table["columns"]
    ]
    if len(cells) != 1:
        raise LookupError(f"{len(cells)} cells of the record are of row {row!r} and column {column!r}")
    return str(cells[0])


def _body(file: Path) -> str:
    return file.read_text(encoding="utf-8").partition("\n\n")[2]


if __name__ == "__main__":
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        document.write_text(with_figures(text), encoding="utf-8")
