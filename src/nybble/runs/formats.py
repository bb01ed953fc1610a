"""The formats of a run's base where its layers have several: measured once, kept in the run folder, shown."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from nybble.errors import RunError
from nybble.files.disk import write_complete
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.quantization.mixed import MixedFormats

if TYPE_CHECKING:
    pass


def show_mixed(console: Console, mixed: MixedFormats) -> None:
    """Bits of every layer, a row a block."""
    rows: dict[str, dict[str, str]] = {}
    for name in mixed.formats.layers:
        block, leaf = _block_and_leaf(name)
        rows.setdefault(block, {})[leaf] = str(mixed.formats.of(name).bits)
    leaves = list(dict.fromkeys(leaf for row in rows.values() for leaf in row))
    title = f"bits of each layer: {mixed.bits:.3f} a weight, predicted KL {mixed.predicted_kl:.3g} nats a token"
    table = Table(title=title, title_justify="left")
    table.add_column("block")
    for leaf in leaves:
        table.add_column(leaf, justify="right")
    for block, row in rows.items():
        table.add_row(block, *(row.get(leaf, "") for leaf in leaves))
    console.print(table)


def _block_and_leaf(name: str) -> tuple[str, str]:
    """`model.layers.3.mlp.up_proj` -> `3`, `mlp.up_proj`."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
    return parts[number], ".".join(parts[number + 1 :])


def write_formats(path: Path, mixed: MixedFormats) -> None:
    """`formats.json`: the format of every layer, and the predicted losses it was chosen by."""
    content = {
        "bits": mixed.bits,
        "predicted_kl": mixed.predicted_kl,
        "layers": mixed.formats.layers,
        "losses": mixed.losses,
    }
    write_complete(path, json.dumps(content, indent=1) + "\n")


def read_formats(path: Path, spec: QuantSpec) -> BaseFormats:
    """The formats of a run's layers, with `spec`'s block size and double quantisation.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        return BaseFormats(spec, json.loads(path.read_text(encoding="utf-8"))["layers"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path} is missing or damaged: {error}.",
            "A run with --mixed keeps the format of each layer there.",
            "Restore the file, or train again.",
        ) from error
