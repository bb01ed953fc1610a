"""`nybble synth`."""

from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import track

from nybble.options.option import build_options
from nybble.options.verbs import SynthConfig


def synth(given: dict[str, Any]) -> int:
    """Write a model of a published shape with random weights in four bits, to rehearse memory and time with."""
    config = build_options(SynthConfig, given)
    from nybble.formats.quant_spec import QuantSpec
    from nybble.quantization.synth import synthesize
    from nybble.units import format_bytes

    spec = QuantSpec(config.format, config.block_size, config.double_quant)
    console = Console()
    progress = partial(track, description="drawing", console=console, transient=True)
    num_bytes = synthesize(config.shape, spec, config.out, config.seed, progress)
    console.print(f"{config.out} holds {config.shape} with random weights, {format_bytes(num_bytes)}.", highlight=False)
    return 0
