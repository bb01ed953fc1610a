"""How weights are put into four bits, and what that costs them."""

from collections.abc import Sequence

from nybble.cli.render.terminal import Terminal, new_table, show
from nybble.quantization.partial import LayerReport
from nybble.quantization.sensitivity import MixedMeasured
from nybble.runs.base import RoundingChosen


@show.register
def _(event: RoundingChosen, terminal: Terminal) -> None:
    terminal.say(f"quality of the four bits: {event.rounding} ({event.why})")


@show.register
def _(event: MixedMeasured, terminal: Terminal) -> None:
    """Bits of every layer, a row a block."""
    mixed = event.mixed
    rows: dict[str, dict[str, str]] = {}
    for name in mixed.formats.layers:
        block, leaf = _block_and_leaf(name)
        rows.setdefault(block, {})[leaf] = str(mixed.formats.of(name).bits)
    leaves = list(dict.fromkeys(leaf for row in rows.values() for leaf in row))
    title = f"bits of each layer: {mixed.bits:.3f} a weight, predicted KL {mixed.predicted_kl:.3g} nats a token"
    table = new_table(title, ["block", *leaves], right=leaves)
    for block, row in rows.items():
        table.add_row(block, *(row.get(leaf, "") for leaf in leaves))
    terminal.console.print(table)


def _block_and_leaf(name: str) -> tuple[str, str]:
    """`model.layers.3.mlp.up_proj` -> `3`, `mlp.up_proj`."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
    return parts[number], ".".join(parts[number + 1 :])


def show_reports(terminal: Terminal, reports: Sequence[LayerReport], calibrated: bool) -> None:
    """What each layer lost, and what it would have lost by absmax."""
    lost = "of its output on the calibration text" if calibrated else "of its weights"
    columns = ("layer", "by", "absmax", "now", "note")
    table = new_table(f"relative error (rms) {lost}", columns, right=("absmax", "now"))
    for report in reports:
        errors = [f"{error**0.5:.2%}" for error in (report.absmax_error, report.error)]
        table.add_row(report.name, report.method, *errors, report.note)
    terminal.console.print(table)
