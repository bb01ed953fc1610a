"""Back to four bits: what merged weights are rounded with.

W + ΔW is put into four bits as any base is (quantization/folder.py), by default calibrated on what the run was
trained on.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from nybble.data.calibration_text import CalibrationText
from nybble.data.examples import EncodedExample
from nybble.data.prepare import field_names, prepare_data
from nybble.errors import DataError
from nybble.exporting.merged_source import MergedSource
from nybble.formats.quantized_tensor import QuantSpec
from nybble.layers.precision import resolve_compute_dtype
from nybble.options.groups import ExportOptions
from nybble.quantization.folder import CalibrationInput, Quality, quantize_folder
from nybble.runs.base import run_calibration_text
from nybble.runs.open_run import OpenRun
from nybble.sources.load import load_model
from nybble.sources.open import open_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merged_spec(opened: OpenRun) -> QuantSpec:
    """NF4 as the run had it, or would have had it."""
    return QuantSpec("nf4", opened.config.block_size, opened.config.double_quant)


def rounding_input(
    opened: OpenRun, options: ExportOptions, held_out: Sequence[EncodedExample], console: Console
) -> CalibrationInput | None:
    """What the merged weights are calibrated with; None where they are not.

    Args:
        held_out: rows that the result is judged by, which --calibrate must not hold.

    Raises:
        DataError: --calibrate cannot be read, is too short, or holds held-out rows.
    """
    if options.quality != "calibrated":
        return None
    text = _text(opened, options, held_out, console)
    console.print(f"calibrating on {text.description}", highlight=False, markup=False)
    return CalibrationInput(text.windows, resolve_compute_dtype("auto", torch.device("cpu")))


def load_rounded(
    merged: MergedSource, quality: Quality, calibration: CalibrationInput | None, dtype: torch.dtype
) -> "PreTrainedModel":
    """The merged model in four bits, in memory."""
    spec = merged_spec(merged.opened)
    if quality != "calibrated":
        return load_model(merged, spec, dtype, quality=quality)
    with tempfile.TemporaryDirectory(prefix=".tmp-rounded-", dir=merged.opened.run.path) as folder:
        out = Path(folder) / "model"
        share = merged.opened.config.max_dense_share
        quantize_folder(merged, spec, out, quality=quality, calibration=calibration, max_dense_share=share)
        return load_model(open_source(str(out)), spec, dtype)


def _text(
    opened: OpenRun, options: ExportOptions, held_out: Sequence[EncodedExample], console: Console
) -> CalibrationText:
    """From --calibrate, else from the run's training rows; where those are gone or too few, general text alone."""
    config, template = opened.config, opened.template

    def text(train: Sequence[EncodedExample]) -> CalibrationText:
        return run_calibration_text(options, opened.source, train, held_out, template, field_names(config), config.seed)

    if options.calibrate is not None:
        return text([])
    try:
        return text(prepare_data(config, template, opened.source.config.get_text_config().vocab_size).train)
    except DataError as error:
        console.print(f"The run's training rows are not calibrated on: {error.got}", highlight=False, markup=False)
        return text([])
