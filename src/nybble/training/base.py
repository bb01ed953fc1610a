"""The frozen weights of a run: as they are stored, or put into few bits for it."""

from dataclasses import dataclass

from nybble.data.calibration_text import CalibrationText
from nybble.events import Listener
from nybble.formats.quant_spec import BaseFormats
from nybble.layers.convert import new_adapter_sizes
from nybble.options.adapter_groups import TAKES_FROM_BASE
from nybble.planning.request import plan_run
from nybble.quantization.residual import ResidualSource
from nybble.quantization.sensitivity import MixedFormats, measure_formats
from nybble.quantization.walk import WalkError
from nybble.runs.base import (
    RoundingChoice,
    RoundingChosen,
    base_formats,
    check_calibration_fits,
    choose_rounding,
    data_free_rounding,
    kept_base,
    make_calibrated_base,
    make_residual_base,
    quant_spec,
    run_calibration_text,
    without_calibration,
)
from nybble.sources.stored_model import StoredModel
from nybble.training.start import Examples, Opened


@dataclass(frozen=True)
class Base:
    """What the frozen weights are loaded from, and how they are put into four bits.

    Args:
        source: the run's own, or the calibrated folder made from it.
        rounding: None where there is nothing to put into four bits.
        mixed: where the formats of its layers were measured for this run.
        residual: where the adapters begin with a part of the weights.
    """

    source: StoredModel
    formats: BaseFormats | None
    rounding: RoundingChoice | None
    mixed: MixedFormats | None
    residual: ResidualSource | None = None


def choose_base(opened: Opened, examples: Examples, report: Listener) -> Base:
    """Rounding and formats, and the calibrated folder where that is the rounding; a resumed run has its own."""
    config, source, dtype, device = opened.config, opened.source, opened.dtype, opened.device
    rounding = choose_rounding(config, source, examples.data, examples.num_steps, dtype, device)
    if rounding is not None:
        report(RoundingChosen(rounding.rounding, rounding.why))
    calibrated = rounding is not None and rounding.rounding == "calibrated"
    begins, mixes = not config.run.resume, config.rounding.mixed is not None
    if begins and config.memory.memory is not None and (calibrated or mixes):
        # What never fits is refused before minutes are spent on its bits.
        plan_run(config, source, None, examples.micro_batches, dtype, device, calibrated)
    if begins and calibrated:
        check_calibration_fits(config, source, dtype, device)
    mixed = None
    if begins and mixes:
        mixed = _measure_mixed(opened, examples, report)
    formats = mixed.formats if mixed is not None else base_formats(config.weights, config.rounding.mixed, opened.run)
    takes = config.adapters.init in TAKES_FROM_BASE
    if rounding is None or not (calibrated or takes):
        return Base(source, formats, rounding, mixed)
    kept = None if begins else kept_base(opened.run, source.task)
    if kept is not None:
        return Base(kept, formats, rounding, mixed)
    assert formats is not None
    if takes:
        residual = ResidualSource(source, config.adapters.init, new_adapter_sizes(source.skeleton, config.adapters))
        put, share = data_free_rounding(config.rounding), config.weights.max_dense_share
        made = make_residual_base(opened.run, residual, formats, put, share, report)
        return Base(made, formats, rounding, mixed, residual)
    try:
        text = text_of_rows(opened, examples)
        share = config.weights.max_dense_share
        made = make_calibrated_base(opened.run, source, formats, text, dtype, share, report)
        return Base(made, formats, rounding, mixed)
    except WalkError as error:
        instead = without_calibration(rounding, error)
        report(RoundingChosen(instead.rounding, instead.why))
        return Base(source, formats, instead, mixed)


def text_of_rows(opened: Opened, examples: Examples) -> CalibrationText:
    """The text to calibrate on: what --calibrate names, else the run's own rows."""
    config, data = opened.config, examples.data
    return run_calibration_text(
        config.rounding, config.data, opened.source, data.train, data.validation, opened.template
    )


def _measure_mixed(opened: Opened, examples: Examples, report: Listener) -> MixedFormats:
    """The formats of the base's layers, by what the model's answers on the calibration text would suffer."""
    bits, spec = opened.config.rounding.mixed, quant_spec(opened.config.weights)
    assert spec is not None and bits is not None
    windows = text_of_rows(opened, examples).windows
    return measure_formats(opened.source, bits, spec, windows, opened.dtype, opened.device, report)
