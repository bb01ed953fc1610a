"""The audit of examples, and single ones."""

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from nybble.cli.render.terminal import Terminal, show
from nybble.data.audit import Audit, Audited
from nybble.data.examples import EncodedExample
from nybble.data.mixture import MixedPart

SUPERVISED_STYLE = "black on green"
CONTEXT_STYLE = "dim"
LEVEL_STYLES = {"error": "bold red", "warning": "yellow"}


@show.register
def _(event: Audited, terminal: Terminal) -> None:
    terminal.console.print(render_audit(event.audit))


def render_audit(audit: Audit) -> Group:
    """Counts as a table, then notices and findings, each with the rows it concerns and what to do."""
    table = Table.grid(padding=(0, 2))
    for name, value in _counts(audit):
        table.add_row(Text(name, style="dim"), Text(value))
    lines = [Text(f"note  {notice}", style="cyan") for notice in audit.notices]
    for finding in audit.findings:
        if finding.id in audit.allowed:
            lines.append(Text(f"accepted  {finding}", style="dim"))
            continue
        lines.append(Text(f"{finding.level}  {finding}", style=LEVEL_STYLES[finding.level]))
        lines.append(Text(f"         {finding.fix}", style="dim"))
    return Group(table, *lines)


def _counts(audit: Audit) -> list[tuple[str, str]]:
    lengths = ", ".join(f"{name} {value:,}" for name, value in audit.length_percentiles.items())
    held_out = "from " + audit.validation_source if audit.validation_source else "split off, seeded"
    return [
        ("data", f"{audit.source} ({audit.layout})"),
        ("rows", f"{audit.num_rows:,} read, {audit.num_dropped:,} dropped, {audit.num_truncated:,} truncated"),
        ("train", _sequences(audit.num_train, audit.tokens, audit.supervised_tokens)),
        (
            "validation",
            _sequences(audit.num_validation, audit.validation_tokens, audit.validation_supervised_tokens)
            + f" ({held_out})",
        ),
        ("lengths", f"{lengths}, longest {audit.longest:,} (max_seq_len {audit.max_seq_len:,})"),
        *(("weighted", _mixed(part)) for part in audit.mixture),
    ]


def _mixed(part: MixedPart) -> str:
    again = f", {part.drawn / part.rows:.2f} times each" if part.drawn > part.rows else ""
    return (
        f"{part.name}: {part.share:.1%} of the rows drawn ({part.supervised_share:.1%} of the supervised tokens), "
        f"in the first epoch {part.drawn:,} of its {part.rows:,}{again}"
    )


def _sequences(num: int, tokens: int, supervised: int) -> str:
    return f"{num:,} sequences, {tokens:,} tokens, {supervised:,} of them supervised"


def render_example(example: EncodedExample, tokenizer: PreTrainedTokenizerBase) -> Panel:
    """The text of a sequence, supervised tokens coloured, titled with where it comes from."""
    text = Text()
    supervised = example.supervised.tolist()
    start = 0
    for end in range(1, len(example) + 1):
        if end == len(example) or supervised[end] != supervised[start]:
            run = tokenizer.decode(example.input_ids[start:end].tolist(), clean_up_tokenization_spaces=False)
            text.append(str(run), style=SUPERVISED_STYLE if supervised[start] else CONTEXT_STYLE)
            start = end
    title = f"{example.origin}: {len(example)} tokens, {example.supervised_tokens} supervised"
    return Panel(text, title=Text(title), title_align="left")
