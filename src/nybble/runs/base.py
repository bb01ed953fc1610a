"""The four-bit base of a run: how its bits are chosen, and, where they are calibrated, the folder that holds them.

Calibrated weights depend on text, so they cannot be made again from the model alone: they lie in `base/` of the run,
a folder as `nybble quantize` writes it, with a manifest. Searched and absmax weights are made anew at each loading.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from nybble.calibration.search import check_searchable
from nybble.data.calibration_text import CalibrationText, calibration_text, read_calibration_file
from nybble.data.examples import EncodedExample
from nybble.data.prepare import PreparedData
from nybble.data.readers import FieldNames
from nybble.data.template import ChatTemplate
from nybble.errors import PlanError
from nybble.events import Event, Listener, Note, silent
from nybble.files.manifest import verify_manifest
from nybble.formats.format import FORMATS
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.layers.context import context_length
from nybble.memory.measure import anonymous_bytes, available_bytes, has_own_memory
from nybble.memory.store import FolderBlockStore
from nybble.options.groups import DENSE_SHARE, CalibrationOptions
from nybble.options.verbs import TrainConfig
from nybble.planning.calibration_costs import calibration_bytes, calibration_products, training_products
from nybble.planning.costs import ModelShape
from nybble.planning.request import quantize_command
from nybble.planning.shape import shape_of
from nybble.quantization.folder import CalibrationInput, Rounding, quantize_folder
from nybble.quantization.walk import WalkError
from nybble.runs.folder import RunFolder
from nybble.runs.formats import read_formats
from nybble.sources.load import load_model
from nybble.sources.open import open_model
from nybble.sources.stored_model import StoredModel
from nybble.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AFFORDABLE = 0.1  # of the training's time that calibrating may take before it is left out


@dataclass(frozen=True)
class RoundingChoice:
    """How a run's weights are put into four bits, and why so.

    Args:
        asked: the user did; what was asked for is done, or the run refused.
    """

    rounding: Rounding
    why: str
    asked: bool = False


@dataclass(frozen=True)
class RoundingChosen(Event):
    """How the weights are put into four bits, and why so."""

    kind: ClassVar[str] = "rounding"
    rounding: Rounding
    why: str


def quant_spec(config: TrainConfig) -> QuantSpec | None:
    """The four-bit format of a run's base, None where it stays in 16 bits."""
    if config.format == "none":
        return None
    return QuantSpec(config.format, config.block_size, config.double_quant)


def data_free_rounding(config: TrainConfig) -> Literal["absmax", "search"]:
    """What weights that were not calibrated get."""
    return "search" if config.quality == "search" else "absmax"


def choose_rounding(
    config: TrainConfig,
    source: StoredModel,
    data: PreparedData,
    total_steps: int,
    dtype: torch.dtype,
    device: torch.device,
) -> RoundingChoice | None:
    """What the options ask for; of "auto", what time and memory allow. None where there is nothing to put into four
    bits.

    Raises:
        FormatError: search or calibration is asked for in a format with zero points.
    """
    if config.format == "none" or source.quant_spec is not None:
        return None
    if config.quality in ("search", "calibrated") or config.calibrate is not None:
        check_searchable(config.format)
    if config.quality in ("absmax", "search"):
        return RoundingChoice(config.quality, "as asked", asked=True)
    if not FORMATS[config.format].searchable:
        return RoundingChoice("absmax", f"{config.format} has zero points, which are not calibrated")
    if config.quality == "calibrated" or config.calibrate is not None:
        why = "as asked" if config.calibrate is None else "text to calibrate on was given"
        return RoundingChoice("calibrated", why, asked=True)
    needed = calibration_peak(config, source, dtype)
    room = _budget(config, device) or anonymous_bytes() + available_bytes(torch.device("cpu"))
    if needed > room:
        return RoundingChoice("absmax", f"calibrating would take about {format_bytes(needed)} of memory")
    shape = _shape(source)
    tokens_a_row = sum(len(row) for row in data.train) / len(data.train)
    supervised = sum(row.supervised_tokens for row in data.train) / len(data.train)
    rows = total_steps * config.rows_per_step
    training = training_products(shape, rows * tokens_a_row, rows * supervised)
    share = calibration_products(shape, config.calibration_tokens, dtype.itemsize) / training
    if share < AFFORDABLE:
        return RoundingChoice("calibrated", f"predicted to take {share:.1%} of the training's time")
    # Not "search": without data it lowers the error of the weights, not reliably that of the model (docs/lab-notes.md).
    return RoundingChoice("absmax", f"calibrating is predicted to take {share:.0%} of the training's time")


def calibration_peak(config: TrainConfig, source: StoredModel, dtype: torch.dtype) -> int:
    """Bytes that this process will hold at the height of calibrating."""
    spec = quant_spec(config)
    assert spec is not None
    needed = calibration_bytes(_shape(source), spec, config.calibration_tokens, dtype.itemsize)
    return anonymous_bytes() + needed


def check_calibration_fits(config: TrainConfig, source: StoredModel, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse to calibrate where that takes more than --memory.

    Raises:
        PlanError: it does.
    """
    budget, needed = _budget(config, device), calibration_peak(config, source, dtype)
    if budget is not None and needed > budget:
        command, folder = quantize_command(config)
        raise PlanError(
            f"Calibrating {source.name} takes about {format_bytes(needed)}; the budget is {format_bytes(budget)}.",
            "What takes less: --quality absmax; a folder in four bits; fewer --calibration-tokens, where it is their "
            "states that take the room.",
            f"Or where there is more memory: {command} --quality calibrated, then --model {shlex.quote(folder)}",
        )


def _budget(config: TrainConfig, device: torch.device) -> int | None:
    """Of memory for the CPU, where calibrating happens."""
    return None if has_own_memory(device) else config.memory


def _shape(source: StoredModel) -> ModelShape:
    return shape_of(source.skeleton)


def run_calibration_text(
    config: CalibrationOptions,
    source: StoredModel,
    train: Sequence[EncodedExample],
    validation: Sequence[EncodedExample],
    template: ChatTemplate,
    fields: FieldNames,
    seed: int,
) -> CalibrationText:
    """From --calibrate, which must hold no validation row, else from the training rows."""
    if config.calibrate is not None:
        own, name = read_calibration_file(config.calibrate, template, fields, validation), config.calibrate
    else:
        own, name = [row.input_ids for row in train], "the training rows"
    context = context_length(source.config)
    return calibration_text(own, name, template, num_tokens=config.calibration_tokens, context=context, seed=seed)


def make_calibrated_base(
    run: RunFolder,
    source: StoredModel,
    formats: BaseFormats,
    text: CalibrationText,
    dtype: torch.dtype,
    max_dense_share: float = DENSE_SHARE,
    report: Listener = silent,
) -> StoredModel:
    """Calibrate where the run lies until it trains. Interrupted, the next run goes on from the finished blocks."""
    folder = run.starting.base
    report(Note(f"calibrating on {text.description}"))
    quantize_folder(
        source,
        formats,
        folder,
        rounding="calibrated",
        calibration=CalibrationInput(text.windows, dtype),
        max_dense_share=max_dense_share,
        what="calibrating",
        report=report,
    )
    return open_model(str(folder))


def without_calibration(choice: RoundingChoice, error: WalkError) -> RoundingChoice:
    """What is done instead, where calibrating was nybble's own choice.

    Raises:
        WalkError: it was the user's.
    """
    if choice.asked:
        raise error
    return RoundingChoice("absmax", f"it cannot be calibrated: {error.reason}")


def kept_base(run: RunFolder) -> StoredModel | None:
    """The calibrated base in the run's folder, verified; None where there is none.

    Raises:
        FormatError: a file of it is missing or damaged.
    """
    if not run.base.is_dir():
        return None
    verify_manifest(run.base)
    return open_model(str(run.base))


def base_formats(config: TrainConfig, run: RunFolder) -> BaseFormats | None:
    """How the base of the run in this folder is quantised, None where it stays in 16 bits."""
    spec = quant_spec(config)
    if spec is None:
        return None
    return BaseFormats(spec) if config.mixed is None else read_formats(run.formats, spec)


def load_base(
    config: TrainConfig,
    source: StoredModel,
    formats: BaseFormats | None,
    dtype: torch.dtype,
    device: torch.device,
    store: FolderBlockStore | None = None,
    stream_ends: bool = False,
    report: Listener = silent,
) -> "PreTrainedModel":
    """The frozen base of a run, but what is streamed. A source in four bits keeps its own."""
    return load_model(
        source,
        formats,
        dtype,
        device,
        data_free_rounding(config),
        stream_linears_of=() if store is None else store.names,
        stream_ends=stream_ends,
        report=report,
    )
