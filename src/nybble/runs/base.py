"""The four-bit base of a run: how its bits are chosen, and the folder that holds them where they cannot be made again.

Calibrated weights depend on text, and what adapters have left of the weights (--init pissa) on these adapters: they lie
in `base/` of the run, a folder as `nybble quantize` writes it, with a manifest. Searched and absmax weights of the
model itself are made anew at each loading.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nybble.calibration.search import check_searchable
from nybble.data.calibration_text import CalibrationText, calibration_text, read_calibration_file
from nybble.data.encoded_rows import TokenIds
from nybble.data.examples import EncodedExample
from nybble.data.field_names import field_names
from nybble.data.prepare import PreparedData
from nybble.data.template import ChatTemplate
from nybble.errors import ConfigError, PlanError
from nybble.events import Event, Listener, Note, silent
from nybble.files.manifest import verify_manifest
from nybble.formats.format import DEFAULT_FORMAT, FORMATS, STORED
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.layers.context import context_length
from nybble.memory.measure import anonymous_bytes, available_bytes, has_own_memory
from nybble.options.adapter_groups import TAKES_FROM_BASE
from nybble.options.groups import (
    DENSE_SHARE,
    CalibrationOptions,
    DataOptions,
    FourBitOptions,
    MemoryOptions,
    QualityOptions,
)
from nybble.options.verbs import TrainConfig
from nybble.planning.calibration_costs import calibration_bytes, calibration_products, training_products
from nybble.planning.request import quantize_command
from nybble.planning.run_shape import ModelShape
from nybble.planning.shape import shape_of
from nybble.quantization.folder import CalibrationInput, Rounding, quantize_folder
from nybble.quantization.residual import ResidualSource
from nybble.quantization.walk import WalkError
from nybble.runs.folder import RunFolder
from nybble.runs.formats import read_formats
from nybble.sources.open import open_model
from nybble.sources.skeleton import reads_whole
from nybble.sources.stored_model import StoredModel
from nybble.sources.task import Task
from nybble.units import format_bytes

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


def quant_spec(weights: FourBitOptions) -> QuantSpec | None:
    """The four-bit format of a base, None where it stays in 16 bits. One that is stored in few bits keeps its own."""
    if weights.format == "none":
        return None
    format = DEFAULT_FORMAT if weights.format == STORED else weights.format
    return QuantSpec(format, weights.block_size, weights.double_quant)


def in_asked_bits(source: StoredModel, weights: FourBitOptions) -> StoredModel:
    """The source as it is, or with its own few bits where those are asked for.

    Raises:
        FormatError: it has none that are trained over.
    """
    return source.as_stored() if weights.format == STORED else source


def data_free_rounding(rounding: QualityOptions) -> Literal["absmax", "search"]:
    """What weights that were not calibrated get."""
    return "search" if rounding.quality == "search" else "absmax"


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
    format, rounding = config.weights.format, config.rounding
    if format == "none" or source.quant_spec is not None:
        return None
    if rounding.quality in ("search", "calibrated") or rounding.calibrate is not None:
        check_searchable(format)
    if reads_whole(source.config) or source.task.kind in ("pictured", "seq2seq"):
        return _without_text(rounding, source.task)
    if rounding.quality in ("absmax", "search"):
        return RoundingChoice(rounding.quality, "as asked", asked=True)
    if not FORMATS[format].searchable:
        return RoundingChoice("absmax", f"{format} has zero points, which are not calibrated")
    if rounding.quality == "calibrated" or rounding.calibrate is not None:
        why = "as asked" if rounding.calibrate is None else "text to calibrate on was given"
        return RoundingChoice("calibrated", why, asked=True)
    if config.adapters.init in TAKES_FROM_BASE:
        return RoundingChoice("absmax", f"what {config.adapters.init} leaves of the weights is not calibrated")
    needed = calibration_peak(config.weights, rounding.calibration_tokens, source, dtype)
    room = _budget(config.memory, device) or anonymous_bytes() + available_bytes(torch.device("cpu"))
    if needed > room:
        return RoundingChoice("absmax", f"calibrating would take about {format_bytes(needed)} of memory")
    shape = _shape(source)
    tokens_a_row = int(data.train.lengths.sum()) / len(data.train)
    supervised = int(data.train.supervised_tokens.sum()) / len(data.train)
    rows = total_steps * config.memory.rows_per_step
    training = training_products(shape, rows * tokens_a_row, rows * supervised)
    share = calibration_products(shape, rounding.calibration_tokens, dtype.itemsize) / training
    if share < AFFORDABLE:
        return RoundingChoice("calibrated", f"predicted to take {share:.1%} of the training's time")
    # Not "search": without data it lowers the error of the weights, not reliably that of the model (docs/lab-notes.md).
    return RoundingChoice("absmax", f"calibrating is predicted to take {share:.0%} of the training's time")


def _without_text(rounding: QualityOptions, task: Task) -> RoundingChoice:
    """What is done with an encoder, an encoder-decoder or a model that reads pictures, which are not calibrated.

    Raises:
        ConfigError: calibrating was asked for.
    """
    what = {"pictured": "models that read pictures", "seq2seq": "encoder-decoders"}.get(task.kind, "encoders")
    if rounding.quality == "calibrated" or rounding.calibrate is not None:
        raise ConfigError(
            f"Calibrated weights are asked for, and these are for no {what}.",
            "Decoders of text are calibrated, block by block; other models' weights are absmax or searched.",
            "Leave --calibrate out, and take --quality search, which looks at the weights alone, or absmax.",
        )
    if rounding.quality in ("absmax", "search"):
        return RoundingChoice(data_free_rounding(rounding), "as asked", asked=True)
    return RoundingChoice("absmax", f"{what} are not calibrated")


def calibration_peak(weights: FourBitOptions, num_tokens: int, source: StoredModel, dtype: torch.dtype) -> int:
    """Bytes that this process will hold at the height of calibrating."""
    spec = quant_spec(weights)
    assert spec is not None
    needed = calibration_bytes(_shape(source), spec, num_tokens, dtype.itemsize)
    return anonymous_bytes() + needed


def check_calibration_fits(config: TrainConfig, source: StoredModel, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse to calibrate where that takes more than --memory.

    Raises:
        PlanError: it does.
    """
    budget = _budget(config.memory, device)
    needed = calibration_peak(config.weights, config.rounding.calibration_tokens, source, dtype)
    if budget is not None and needed > budget:
        command, folder = quantize_command(config)
        raise PlanError(
            f"Calibrating {source.name} takes about {format_bytes(needed)}; the budget is {format_bytes(budget)}.",
            "What takes less: --quality absmax; a folder in four bits; fewer --calibration-tokens, where it is their "
            "states that take the room.",
            f"Or where there is more memory: {command} --quality calibrated, then --model {shlex.quote(folder)}",
        )


def _budget(options: MemoryOptions, device: torch.device) -> int | None:
    """Of memory for the CPU, where calibrating happens."""
    return None if has_own_memory(device) else options.memory


def _shape(source: StoredModel) -> ModelShape:
    return shape_of(source.skeleton)


def run_calibration_text(
    calibration: CalibrationOptions,
    data: DataOptions,
    source: StoredModel,
    train: Sequence[EncodedExample],
    validation: Sequence[EncodedExample],
    template: ChatTemplate,
) -> CalibrationText:
    """From --calibrate, which must hold no validation row, else from the training rows."""
    own: Sequence[Tensor] = TokenIds(train)
    name = "the training rows"
    if calibration.calibrate is not None:
        name = calibration.calibrate
        own = read_calibration_file(name, template, field_names(data), validation)
    num_tokens, context = calibration.calibration_tokens, context_length(source.config)
    return calibration_text(own, name, template, num_tokens=num_tokens, context=context, seed=data.seed)


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
    return open_model(str(folder)).for_task(source.task)


def make_residual_base(
    run: RunFolder,
    residual: ResidualSource,
    formats: BaseFormats,
    rounding: Literal["absmax", "search"],
    max_dense_share: float = DENSE_SHARE,
    report: Listener = silent,
) -> StoredModel:
    """Put what adapters leave of the weights into four bits where the run lies until it trains."""
    folder = run.starting.base
    what = f"taking {residual.way} out of the weights"
    quantize_folder(
        residual, formats, folder, rounding=rounding, max_dense_share=max_dense_share, what=what, report=report
    )
    return open_model(str(folder)).for_task(residual.task)


def without_calibration(choice: RoundingChoice, error: WalkError) -> RoundingChoice:
    """What is done instead, where calibrating was nybble's own choice.

    Raises:
        WalkError: it was the user's.
    """
    if choice.asked:
        raise error
    return RoundingChoice("absmax", f"it cannot be calibrated: {error.reason}")


def kept_base(run: RunFolder, task: Task) -> StoredModel | None:
    """The calibrated base, or what adapters left of it, in the run's folder, verified; None where there is none.

    Raises:
        FormatError: a file of it is missing or damaged.
    """
    if not run.base.is_dir():
        return None
    verify_manifest(run.base)
    return open_model(str(run.base)).for_task(task)


def base_formats(weights: FourBitOptions, mixed: float | None, run: RunFolder) -> BaseFormats | None:
    """How the base of the run in this folder is quantised, None where it stays in 16 bits."""
    spec = quant_spec(weights)
    if spec is None:
        return None
    return BaseFormats(spec) if mixed is None else read_formats(run.formats, spec)
