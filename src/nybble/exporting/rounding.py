"""Back to four bits: what merged weights are rounded with.

W + ΔW is put into four bits as any base is (quantization/folder.py), by default calibrated on what the run was
trained on.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nybble.data.calibration_text import CalibrationText
from nybble.data.examples import EncodedExample
from nybble.data.prepare import prepare_data
from nybble.data.row_kinds import ROW_KINDS
from nybble.errors import DataError
from nybble.events import Listener, Note, silent
from nybble.exporting.merged_source import MergedSource
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.layers.precision import resolve_compute_dtype
from nybble.options.use_groups import ArtefactKind, RoundingOptions
from nybble.quantization.folder import CalibrationInput, Rounding, quantize_folder
from nybble.runs.base import run_calibration_text
from nybble.runs.open_run import OpenRun
from nybble.sources.load import load_model
from nybble.sources.open import open_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merged_formats(opened: OpenRun) -> BaseFormats:
    """The format that the artefact is named for, with scales as the run had them, or would have had them."""
    weights = opened.config.weights
    return BaseFormats(QuantSpec(ArtefactKind.FOUR_BIT.value, weights.block_size, weights.double_quant))


def rounding_input(
    opened: OpenRun, rounding: RoundingOptions, validation: Sequence[EncodedExample], report: Listener = silent
) -> CalibrationInput | None:
    """What the merged weights are calibrated with; None where they are not.

    Args:
        validation: rows that the result is judged by, which --calibrate must not hold.

    Raises:
        DataError: --calibrate cannot be read, is too short, or holds held-out rows.
    """
    if rounding.quality != "calibrated":
        return None
    text = _text(opened, rounding, validation, report)
    report(Note(f"calibrating on {text.description}"))
    return CalibrationInput(text.windows, resolve_compute_dtype("auto", torch.device("cpu")))


def load_rounded(
    merged: MergedSource, rounding: Rounding, calibration: CalibrationInput | None, dtype: torch.dtype
) -> "PreTrainedModel":
    """The merged model in four bits, in memory."""
    formats = merged_formats(merged.opened)
    if rounding != "calibrated":
        return load_model(merged, formats, dtype, rounding=rounding)
    with tempfile.TemporaryDirectory(prefix=".tmp-rounded-", dir=merged.opened.run.path) as folder:
        out = Path(folder) / "model"
        share = merged.opened.config.weights.max_dense_share
        quantize_folder(merged, formats, out, rounding=rounding, calibration=calibration, max_dense_share=share)
        return load_model(open_model(str(out)), formats, dtype)


def _text(
    opened: OpenRun, rounding: RoundingOptions, validation: Sequence[EncodedExample], report: Listener
) -> CalibrationText:
    """From --calibrate, else from the run's training rows; where those are gone or too few, general text alone."""
    data, source, template = opened.config.data, opened.source, opened.template

    def text(train: Sequence[EncodedExample]) -> CalibrationText:
        return run_calibration_text(rounding, data, source, train, validation, template)

    if rounding.calibrate is not None:
        return text([])
    try:
        kind = ROW_KINDS[opened.config.objective.objective]
        return text(prepare_data(data, template, source.config.get_text_config().vocab_size, kind=kind).train)
    except DataError as error:
        report(Note(f"The run's training rows are not calibrated on: {error.got}"))
        return text([])
