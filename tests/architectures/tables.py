"""The tables of docs/architectures.md: read, and written a line at a time by the tests that fill them."""

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
OF_RUNS = ("tasks", "path", "rows", "in four bits", "fp32", "bf16", "goes on", "in PEFT", "merged")
COLUMNS = {  # of each section; another kind is added here, and as a heading of the page
    "Decoders": ("path", "rows", "fp32", "bf16", "in PEFT"),
    "Encoders": OF_RUNS,
    "Vision models": OF_RUNS,
    "Encoder-decoders": OF_RUNS,
}


def table(section: str) -> dict[str, list[str]]:
    """The lines of a section: model type -> cells, in the order of COLUMNS."""
    lines = _parts(section)[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {name.strip("`"): rest for name, *rest in cells}


def write_lines(section: str, found: dict[str, list[str]]) -> None:
    """Put these lines into a section, in place of those of the same types."""
    before, own, after = _parts(section)
    lines = table(section) | found
    written = [f"| `{name}` | {' | '.join(cells)} |\n" for name, cells in sorted(lines.items())]
    words, columns = own.partition("| model_type")[0], COLUMNS[section]
    head = f"| model_type | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}\n"
    PAGE.write_text(before + words + head + "".join(written) + ("\n" if after else "") + after, encoding="utf-8")


def _parts(section: str) -> tuple[str, str, str]:
    """The page up to a section, with its heading, what it holds, and the rest."""
    text = PAGE.read_text(encoding="utf-8")
    before, heading, rest = text.partition(f"## {section}\n")
    assert heading, f"no section {section} in {PAGE}"
    own, next_heading, after = rest.partition("## ")
    return before + heading, own, next_heading + after


def words_of(error: BaseException) -> str:
    """The first line of what an error says, as a cell."""
    first = next((line for line in str(error).strip().splitlines() if line.strip()), type(error).__name__)
    return first.strip().replace("|", "/")[:140]
