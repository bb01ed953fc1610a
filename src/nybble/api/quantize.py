"""`nybble.quantize`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.api.keywords import as_options
from nybble.events import Listener, silent
from nybble.options.option import build_options
from nybble.options.verbs import QuantizeConfig

if TYPE_CHECKING:
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
        return self.config.out

    @property
    def bitsandbytes(self) -> bool:
        """Whether transformers with bitsandbytes loads it; else only nybble does."""
        return self.config.mixed is None and self.formats.spec.entry.bitsandbytes


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
    import torch

    from nybble.formats.quant_spec import BaseFormats, QuantSpec
    from nybble.quantization.folder import quantize_folder
    from nybble.quantization.sensitivity import measure_formats
    from nybble.sources.open import open_model

    if config.threads:
        torch.set_num_threads(config.threads)
    spec = QuantSpec(config.format, config.block_size, config.double_quant)
    source = open_model(config.model, config.tokenizer, on_event)
    rounding = _rounding(config)
    reads_text = rounding == "calibrated" or config.mixed is not None
    calibration = _calibration(config, source, on_event) if reads_text else None
    formats = BaseFormats(spec)
    if config.mixed is not None and calibration is not None:
        windows, dtype, cpu = calibration.windows, calibration.compute_dtype, torch.device("cpu")
        formats = measure_formats(source, config.mixed, spec, windows, dtype, cpu, on_event).formats
    written = quantize_folder(
        source,
        formats,
        config.out,
        rounding=rounding,
        calibration=calibration,
        max_dense_share=config.max_dense_share,
        report=on_event,
    )
    return QuantizedModel(config, formats, rounding, written)


def _rounding(config: QuantizeConfig) -> "Rounding":
    """What "auto" means here: calibrated where text for it was named, else as bitsandbytes does."""
    if config.quality != "auto":
        return config.quality
    return "absmax" if config.calibrate is None else "calibrated"


def _calibration(config: QuantizeConfig, source: "StoredModel", report: Listener) -> "CalibrationInput":
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
