"""`nybble quantize`."""

from typing import TYPE_CHECKING, Any

import nybble
from nybble.cli.lazy_terminal import LazyTerminal

if TYPE_CHECKING:
    from nybble.sources.parts import Inventory


def quantize(given: dict[str, Any]) -> int:
    """Write a model in four bits, as a folder that transformers with bitsandbytes reads too."""
    with LazyTerminal() as listener:
        done = nybble.quantize(on_event=listener, **given)
    from nybble.cli.render import weights
    from nybble.formats.format import FORMATS

    config, terminal = done.config, listener.terminal
    if done.written.reports:
        weights.show_reports(terminal, done.written.reports, done.rounding == "calibrated")
    if not done.bitsandbytes:
        known = " and ".join(format.name for format in FORMATS.values() if format.bitsandbytes)
        terminal.say(f"Only nybble loads it: bitsandbytes has {known}.")
    named = config.weights.format if config.rounding.mixed is None else "mixed formats"
    terminal.say(f"{done.folder} holds {config.model.model} in {named}, {done.rounding}.")
    terminal.say(f"In 16 bits: {_in_16_bits(done.written.inventory)}.", soft_wrap=True)
    return 0


def _in_16_bits(inventory: "Inventory") -> str:
    """What is not in four bits, with its bytes; where it is more than embedding and head, how much of the blocks."""
    from nybble.planning.run_shape import DENSE_BYTES
    from nybble.units import format_bytes

    parts = [("embedding and head", inventory.end_elements), *inventory.dense, *inventory.around]
    listed = ", ".join(f"{name} {format_bytes(DENSE_BYTES * numel)}" for name, numel in parts)
    return listed + (f" ({inventory.dense_share:.1%} of the blocks' weights)" if inventory.dense else "")
