"""`nybble eval quality`: several ways of putting one model into four bits, each compared with its 16-bit self."""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from nybble.data.examples import EncodedExample
from nybble.data.open_template import open_template
from nybble.data.picture_reader import PicturedRow, have_pictures
from nybble.data.prepare import prepare_data
from nybble.data.sources import refuse_weights
from nybble.errors import ConfigError, DataError, ModelError
from nybble.evaluation.quality import Comparison
from nybble.evaluation.quality import Quality as Lost
from nybble.events import Event, Listener, Note, silent
from nybble.files.disk import disk_errors
from nybble.formats.format import DEFAULT_FORMAT, FORMATS
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.layers.causal_lm import CausalLM
from nybble.layers.pictured_lm import reading
from nybble.layers.precision import set_up
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.options.option import flat, with_options
from nybble.options.verbs import EvalQualityConfig
from nybble.pictures import picture
from nybble.quantization.folder import CalibrationInput, Rounding, quantize_folder
from nybble.runs.base import run_calibration_text
from nybble.runs.context import within_context
from nybble.sources.load import load_model
from nybble.sources.open import open_model
from nybble.sources.stored_model import StoredModel
from nybble.sources.task import PICTURED, Towers, task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPORT, PLOT = "quality.json", "quality.png"


@dataclass(frozen=True)
class Arm:
    """A format, how its scales and levels are chosen, and which parts of a vision-language model have it."""

    format: str
    rounding: Rounding
    towers: Towers | None = None

    @property
    def name(self) -> str:
        return f"{self.format}:{self.rounding}" + (f":{self.towers}" if self.towers else "")


@dataclass(frozen=True)
class ArmResult:
    """Args:
    arm: its name, "format:quality".
    seconds: to put the model into four bits.
    bits_per_weight: of the whole model, embeddings, head and norms included.
    quality: what was lost.
    """

    arm: str
    seconds: float
    bits_per_weight: float
    quality: Lost


@dataclass(frozen=True)
class ArmsCompared(Event):
    """Every arm has been compared with the 16-bit model."""

    results: Sequence[ArmResult]


def compare_arms(config: EvalQualityConfig, report: Listener = silent) -> list[ArmResult]:
    """Make each arm, compare it over held-out rows; write report and plot where `out` is given.

    Raises:
        ConfigError: an arm is not a known format and quality.
        NybbleError: anything else the user can mend.
    """
    refuse_weights(config.data.data, "nothing is trained here")
    arms = [parse_arm(text) for text in config.comparison.arms]
    _, dtype = set_up(config.machine)
    source = open_model(config.model.model, config.model.tokenizer, report, config.model.revision).without_lattice()
    if source.quant_spec is not None:
        raise ModelError(
            f"{source.name} is already in 4 bits ({source.quant_spec.format}).",
            "Needed: a model in 16 or 32 bits to compare with.",
            "Give the 16-bit model.",
        )
    task = task_of("sft", source.config)  # a model that reads no text is refused
    if task.prompted:
        raise ModelError(
            f"{source.name} is an encoder-decoder.",
            "Compared are ways of quantising decoders, by what they say after each token of held-out texts.",
            "`nybble eval` of a run shows what its four bits cost: its loss beside the 16-bit base's.",
        )
    source = source.for_task(task)
    config = with_options(config, max_seq_len=within_context(config.data.max_seq_len, source))
    template = open_template(config.data, source.load_tokenizer(), reader=source.picture_reader)
    data = prepare_data(config.data, template, source.config.get_text_config().vocab_size)
    data.audit.check()
    documents = _documents(data.validation, config.comparison.eval_tokens)
    computed_by: type[CausalLM] = CausalLM
    pictured = have_pictures(data.train + data.validation) or source.task.kind == "pictured"
    if pictured and (reader := source.picture_reader) is not None:
        source, computed_by = source.for_task(PICTURED), reading(reader)
        arms = _towers_of(arms, asked="arms" in config.comparison.model_fields_set)
    elif any(arm.towers for arm in arms):
        raise ConfigError("arms names towers, and no row has a picture.", "Text goes through the language model alone.")
    notes = [*source.notes, f"{len(documents)} held-out documents, {sum(map(len, documents))} tokens"]
    calibration = None
    if any(arm.rounding == "calibrated" for arm in arms):
        text = run_calibration_text(config.calibration, config.data, source, data.train, data.validation, template)
        calibration = CalibrationInput(text.windows, dtype)
        notes.append(f"calibrated on {text.description}")
    for note in notes:
        report(Note(note))

    comparison = Comparison(load_model(source, None, dtype, report=report), documents, computed_by)
    results = [_measure(arm, config, source, calibration, comparison, dtype, report) for arm in arms]
    report(ArmsCompared(results))
    if (out := config.comparison.out) is not None:
        with disk_errors(out, allowed="The report is not complete."):
            _write(out, config, notes, results)
        report(Note(f"{out / REPORT}, {out / PLOT}"))
    return results


def parse_arm(text: str) -> Arm:
    """Read an arm from text such as `nf4:search`, or `nf4:search:all` of a model that reads pictures.

    Raises:
        ConfigError: another form, format or quality.
    """
    format, rounding, towers = (*text.split(":", 2), "", "")[:3]
    if format not in FORMATS or rounding not in get_args(Rounding) or towers not in ("", *get_args(Towers)):
        raise ConfigError(
            f"arms names {text!r}.",
            f"Allowed: FORMAT:QUALITY, formats {', '.join(FORMATS)}, qualities {', '.join(get_args(Rounding))}; of "
            f"models that read pictures also FORMAT:QUALITY:TOWERS, towers {', '.join(get_args(Towers))}.",
            f"For instance --arms {DEFAULT_FORMAT}:absmax,{DEFAULT_FORMAT}:calibrated.",
        )
    return Arm(format, rounding, towers or None)  # type: ignore[arg-type]


def _towers_of(arms: Sequence[Arm], asked: bool) -> list[Arm]:
    """The arms of a model that reads pictures: where none were asked for, what each of its towers loses, and all.

    Raises:
        ConfigError: one of them is calibrated.
    """
    if not asked:
        return [Arm(DEFAULT_FORMAT, "absmax", towers) for towers in get_args(Towers)]
    if calibrated := next((arm for arm in arms if arm.rounding == "calibrated"), None):
        raise ConfigError(
            f"arms names {calibrated.name}, and rows have pictures.",
            "Models that read pictures are not calibrated.",
            "Take absmax or search.",
        )
    return [replace(arm, towers=arm.towers or "language") for arm in arms]


def _documents(rows: Sequence[EncodedExample], num_tokens: int) -> list[Tensor | PicturedRow]:
    """Held-out rows until there are enough tokens; a row of one token predicts nothing."""
    documents: list[Tensor | PicturedRow] = []
    for row in rows:
        if sum(map(len, documents)) >= num_tokens:
            break
        if len(row) > 1:
            documents.append(row if isinstance(row, PicturedRow) else row.input_ids.long())
    if not documents:
        raise DataError("no held-out row has two tokens", "needed: text to compare on")
    return documents


def _measure(
    arm: Arm,
    config: EvalQualityConfig,
    source: StoredModel,
    calibration: CalibrationInput | None,
    comparison: Comparison,
    dtype: torch.dtype,
    report: Listener,
) -> ArmResult:
    formats = BaseFormats(QuantSpec(arm.format, config.scales.block_size, config.scales.double_quant))
    if arm.towers is not None:
        started = time.perf_counter()
        put: Any = arm.rounding
        source = source.for_task(replace(PICTURED, towers=arm.towers))
        model = load_model(source, formats, dtype, rounding=put, report=report)
        seconds = time.perf_counter() - started
        return ArmResult(arm.name, seconds, bits_per_weight(model), comparison.compare(model, config.data.seed))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "arm"
        started = time.perf_counter()
        quantize_folder(
            source,
            formats,
            out,
            rounding=arm.rounding,
            calibration=calibration,
            max_dense_share=config.dense.max_dense_share,
            what=arm.name,
            report=report,
        )
        seconds = time.perf_counter() - started
        model = load_model(open_model(str(out)), formats, dtype)
    return ArmResult(arm.name, seconds, bits_per_weight(model), comparison.compare(model, config.data.seed))


def bits_per_weight(model: "PreTrainedModel") -> float:
    """Bits the whole model takes over the number of its weights; what is not in four bits counts 16."""
    bits, weights, counted = 0, 0, set()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            q = module.quantized()
            bits, weights = bits + 8 * q.nbytes, weights + q.numel
            counted |= {id(module.packed), id(module.scales)}
    for parameter in model.parameters():
        if id(parameter) not in counted:
            bits, weights = bits + 16 * parameter.numel(), weights + parameter.numel()
    return bits / weights


def _write(out: Path, config: EvalQualityConfig, notes: Sequence[str], results: Sequence[ArmResult]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    report = {
        "options": flat(config, "json"),
        "notes": list(notes),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "arms": [asdict(result) for result in results],
    }
    (out / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _draw(out / PLOT, results)


def _draw(path: Path, results: Sequence[ArmResult]) -> None:
    """Mean, median and 99th percentile of KL by arm, on a logarithmic scale."""
    rows = range(len(results))
    with picture(path, "KL to the 16-bit model, nats", inches=(7, 1.2 + 0.5 * len(results)), fitted=True) as axes:
        for label, marker in (("median", "|"), ("mean", "o"), ("p99", "x")):
            axes.plot([getattr(r.quality, f"kl_{label}") for r in results], rows, marker, label=label)
        axes.set_yticks(list(rows), [result.arm for result in results])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.grid(axis="x", alpha=0.3)
        axes.legend()
