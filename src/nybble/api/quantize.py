"""`nybble.quantize`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.api.keywords import as_options
from nybble.errors import ConfigError
from nybble.events import Listener, Note, silent
from nybble.network import fetching
from nybble.options.groups import CalibrationOptions, QualityOptions
from nybble.options.option import build_options
from nybble.options.verbs import QuantizeConfig, SynthConfig
from nybble.units import format_bytes

if TYPE_CHECKING:
    import torch

    from nybble.formats.quant_spec import BaseFormats
    from nybble.quantization.folder import CalibrationInput, QuantizedFolder, Rounding
    from nybble.sources.stored_model import StoredModel


@dataclass(frozen=True)
class QuantizedModel:
    """A folder that `nybble.quantize` wrote.

    Args:
        config: options as they were settled.
        formats: of the layers.
        rounding: how scales and levels were chosen.
        written: what each layer lost, and what is not in four bits.
    """

    config: QuantizeConfig
    formats: "BaseFormats"
    rounding: "Rounding"
    written: "QuantizedFolder"

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.config.output.out

    @property
    def bitsandbytes(self) -> bool:
        """Whether transformers with bitsandbytes loads it; else only nybble does."""
        experts = self.written.inventory.stack_elements > 0
        return not experts and self.config.rounding.mixed is None and self.formats.spec.entry.bitsandbytes


def quantize(*, on_event: Listener = silent, **options: Any) -> QuantizedModel:
    """Write a model in four bits, as a folder that transformers with bitsandbytes reads too.

    Args:
        on_event: told what happens, as it happens.
        options: the flags of `nybble quantize` with underscores. `model` and `out`, a new folder, are needed.

    Returns:
        The folder, the formats of its layers, and what each layer lost where that was measured.

    Raises:
        NybbleError: there is no such model, it is in few bits already, or `out` exists.

    Example:
        >>> small = nybble.quantize(model=tiny, out="models/small", quality="search")
        >>> small.folder.name, small.bitsandbytes, (small.folder / "config.json").exists()
        ('small', True, True)
    """
    config = build_options(QuantizeConfig, as_options(options))
    with fetching(not config.model.offline):
        return _quantize(config, on_event)


def _quantize(config: QuantizeConfig, on_event: Listener) -> QuantizedModel:
    from nybble.formats.quant_spec import BaseFormats, QuantSpec
    from nybble.layers.precision import set_up
    from nybble.quantization.folder import quantize_folder
    from nybble.quantization.sensitivity import measure_formats
    from nybble.sources.open import open_model
    from nybble.sources.skeleton import stored_task

    weights, mixed = config.weights, config.rounding.mixed
    cpu, dtype = set_up(config.machine)
    spec = QuantSpec(weights.format, weights.block_size, weights.double_quant)
    source = open_model(config.model.model, config.model.tokenizer, on_event, config.model.revision)
    source = source.for_task(stored_task(source.config))
    if source.left_out:
        on_event(Note(f"left out, as no part of {source.task.words}: {', '.join(source.left_out)}"))
    rounding = _rounding(config.rounding)
    reads_text = rounding == "calibrated" or mixed is not None
    if reads_text and source.task.kind != "tokens":
        raise ConfigError(
            f"{source.name} is {source.task.words}, and {'mixed' if mixed is not None else 'calibrated'} is asked for.",
            "Decoders are calibrated and measured, block by block, on text that they go on with.",
            "Use --quality search or absmax, and leave --mixed and --calibrate out.",
        )
    calibration = _calibration(config.rounding, dtype, source, on_event) if reads_text else None
    formats = BaseFormats(spec)
    if mixed is not None and calibration is not None:
        formats = measure_formats(source, mixed, spec, calibration.windows, dtype, cpu, on_event).formats
    written = quantize_folder(
        source,
        formats,
        config.output.out,
        rounding=rounding,
        calibration=calibration,
        max_dense_share=weights.max_dense_share,
        report=on_event,
    )
    return QuantizedModel(config, formats, rounding, written)


def synth(*, on_event: Listener = silent, **options: Any) -> Path:
    """Write a model of a published shape with random weights in four bits, to rehearse memory and time with.

    Args:
        on_event: told what is drawn.
        options: the flags of `nybble synth` with underscores. `shape` and `out`, a new folder, are needed.

    Returns:
        The folder.

    Raises:
        NybbleError: an option is wrong, or `out` exists.

    Example:
        >>> nybble.synth(shape="tiny", out="models/random").name
        'random'
    """
    config = build_options(SynthConfig, as_options(options))
    from nybble.formats.quant_spec import QuantSpec
    from nybble.quantization.synth import synthesize

    model, weights = config.model, config.weights
    spec = QuantSpec(weights.format, weights.block_size, weights.double_quant)
    num_bytes = synthesize(model.shape, spec, model.out, model.seed, on_event)
    on_event(Note(f"{model.out} holds {model.shape} with random weights, {format_bytes(num_bytes)}."))
    return model.out


def _rounding(options: QualityOptions) -> "Rounding":
    """What "auto" means here: calibrated where text for it was named, else as bitsandbytes does."""
    if options.quality != "auto":
        return options.quality
    return "absmax" if options.calibrate is None else "calibrated"


def _calibration(
    options: CalibrationOptions, dtype: "torch.dtype", source: "StoredModel", report: Listener
) -> "CalibrationInput":
    from nybble.data.calibration_text import calibration_text, read_calibration_file
    from nybble.data.template import ChatTemplate
    from nybble.layers.context import context_length
    from nybble.quantization.folder import CalibrationInput

    template = ChatTemplate(source.load_tokenizer())
    num_tokens = options.calibration_tokens
    own = [] if options.calibrate is None else read_calibration_file(options.calibrate, template, num_tokens=num_tokens)
    context = context_length(source.config)
    name = options.calibrate or "general text"
    text = calibration_text(own, name, template, num_tokens=num_tokens, context=context)
    report(Note(f"calibrating on {text.description}"))
    return CalibrationInput(text.windows, dtype)
