"""`nybble synth`."""

from typing import Any

from nybble.options.option import build_options
from nybble.options.verbs import SynthConfig


def synth(given: dict[str, Any]) -> int:
    """Write a model of a published shape with random weights in four bits, to rehearse memory and time with."""
    config = build_options(SynthConfig, given)
    from nybble.cli.render import Terminal
    from nybble.formats.quant_spec import QuantSpec
    from nybble.quantization.synth import synthesize
    from nybble.units import format_bytes

    model, weights = config.model, config.weights
    spec = QuantSpec(weights.format, weights.block_size, weights.double_quant)
    with Terminal() as terminal:
        num_bytes = synthesize(model.shape, spec, model.out, model.seed, terminal)
    terminal.say(f"{model.out} holds {model.shape} with random weights, {format_bytes(num_bytes)}.")
    return 0
