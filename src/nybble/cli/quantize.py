"""`nybble quantize`."""

from typing import TYPE_CHECKING, Any

from nybble.options.option import build_options
from nybble.options.verbs import QuantizeConfig

if TYPE_CHECKING:
    from nybble.events import Listener
    from nybble.quantization.folder import CalibrationInput, Quality
    from nybble.sources.parts import Inventory
    from nybble.sources.stored_model import StoredModel


def quantize(given: dict[str, Any]) -> int:
    """Write a model in four bits, as a folder that transformers with bitsandbytes reads too."""
    config = build_options(QuantizeConfig, given)
    import torch

    from nybble.cli.render import Terminal, weights
    from nybble.formats.format import FORMATS
    from nybble.formats.quant_spec import BaseFormats, QuantSpec
    from nybble.quantization.folder import quantize_folder
    from nybble.quantization.mixed import measure_mixed
    from nybble.sources.open import open_model

    if config.threads:
        torch.set_num_threads(config.threads)
    spec = QuantSpec(config.format, config.block_size, config.double_quant)
    with Terminal() as terminal:
        source = open_model(config.model, config.tokenizer, terminal)
        quality = _quality(config)
        reads_text = quality == "calibrated" or config.mixed is not None
        calibration = _calibration(config, source, terminal) if reads_text else None
        formats = BaseFormats(spec)
        if config.mixed is not None and calibration is not None:
            windows, dtype, cpu = calibration.windows, calibration.compute_dtype, torch.device("cpu")
            formats = measure_mixed(source, config.mixed, spec, windows, dtype, cpu, terminal).formats
        done = quantize_folder(
            source,
            formats,
            config.out,
            quality=quality,
            calibration=calibration,
            max_dense_share=config.max_dense_share,
            report=terminal,
        )
    if done.reports:
        weights.show_reports(terminal, done.reports, quality == "calibrated")
    if config.mixed is not None or not spec.entry.bitsandbytes:
        known = " and ".join(format.name for format in FORMATS.values() if format.bitsandbytes)
        terminal.say(f"Only nybble loads it: bitsandbytes has {known}.")
    named = config.format if config.mixed is None else "mixed formats"
    terminal.say(f"{config.out} holds {config.model} in {named}, {quality}.")
    terminal.say(f"In 16 bits: {_in_16_bits(done.inventory)}.", soft_wrap=True)
    return 0


def _in_16_bits(inventory: "Inventory") -> str:
    """What is not in four bits, with its bytes; where it is more than embedding and head, how much of the blocks."""
    from nybble.planning.costs import DENSE_BYTES
    from nybble.units import format_bytes

    parts = [("embedding and head", inventory.end_elements), *inventory.dense, *inventory.around]
    listed = ", ".join(f"{name} {format_bytes(DENSE_BYTES * numel)}" for name, numel in parts)
    return listed + (f" ({inventory.dense_share:.1%} of the blocks' weights)" if inventory.dense else "")


def _quality(config: QuantizeConfig) -> "Quality":
    """What "auto" means here: calibrated where text for it was named, else as bitsandbytes does."""
    if config.quality != "auto":
        return config.quality
    return "absmax" if config.calibrate is None else "calibrated"


def _calibration(config: QuantizeConfig, source: "StoredModel", report: "Listener") -> "CalibrationInput":
    import torch

    from nybble.data.calibration_text import calibration_text, read_calibration_file
    from nybble.data.template import ChatTemplate
    from nybble.events import Note
    from nybble.layers.context import context_length
    from nybble.layers.precision import resolve_compute_dtype
    from nybble.quantization.folder import CalibrationInput

    template = ChatTemplate(source.load_tokenizer())
    num_tokens = config.calibration_tokens
    own = [] if config.calibrate is None else read_calibration_file(config.calibrate, template, num_tokens=num_tokens)
    context = context_length(source.config)
    name = config.calibrate or "general text"
    text = calibration_text(own, name, template, num_tokens=num_tokens, context=context)
    report(Note(f"calibrating on {text.description}"))
    return CalibrationInput(text.windows, resolve_compute_dtype(config.compute_dtype, torch.device("cpu")))
