"""From a run to an artefact that is verified, or marked as one that is not.

It is written into a hidden folder, which becomes `<out>.unverified` once it is complete, and `<out>` once its
consumer has loaded it and it was found to be the tuned model.
"""

import gc
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nybble.data.examples import EncodedExample
from nybble.errors import ExportError
from nybble.evaluation.evaluation_rows import evaluation_rows
from nybble.events import Listener, Note, silent
from nybble.exporting import gguf_model
from nybble.exporting.arrival import deltas_arrived
from nybble.exporting.consumers import CPU, load_consumer
from nybble.exporting.gguf_keys import check_family
from nybble.exporting.merged_source import MergedSource, Onto
from nybble.exporting.modelfile import modelfile
from nybble.exporting.rounding import merged_formats, rounding_input
from nybble.exporting.verify import ANSWER_TOKENS, Outcome, Verification, Verified, ask_run, compare, not_loaded
from nybble.exporting.verify_embeddings import verify_embeddings
from nybble.exporting.verify_scores import check_form, verify_scores
from nybble.files.disk import disk_errors, fsync
from nybble.formats.safetensors import staged_folder
from nybble.memory.measure import available_bytes
from nybble.options.use_groups import ArtefactKind, GgufType
from nybble.options.verbs import ExportConfig, MergeConfig
from nybble.quantization.folder import CalibrationInput, Rounding, quantize_folder, save_dense_folder
from nybble.runs.adapter_files import StoredAdapter
from nybble.runs.adapter_writing import write_plain_adapter
from nybble.runs.open_run import OpenRun, load_tuned, open_run
from nybble.sources.open import open_model
from nybble.sources.stored_model import StoredModel
from nybble.sources.tokenizer import save_tokenizer

REPORT, CARD = "verification.json", "README.md"
SPARE_BYTES = 50_000_000  # tokenizer and configs


@dataclass(frozen=True)
class Artefact:
    """What is to be made.

    Args:
        gguf_type: of a GGUF model.
        onto: which base ΔW is merged onto.
    """

    kind: ArtefactKind
    gguf_type: GgufType
    onto: Onto

    @property
    def faithfulness(self) -> str:
        """The key by which `verify` knows what this artefact promises."""
        if self.kind.is_adapter:
            return self.kind
        name = self.gguf_type if self.kind is ArtefactKind.GGUF else self.kind
        return name if self.onto == "dequantized" else f"{name} onto the original base"


@dataclass(frozen=True)
class ExportResult:
    """An artefact, and what its consumer said of it.

    Args:
        folder: where it is: `out` where it is verified, else `<out>.unverified`.
        verification: the checks and the figures that they were made from.
    """

    folder: Path
    verification: Verification

    @property
    def outcome(self) -> Outcome:
        """The verdict; "undecided" where the run changed too little to tell its artefact from its base."""
        return self.verification.outcome

    @property
    def verified(self) -> bool:
        return self.verification.passed

    @property
    def files(self) -> list[Path]:
        """What was written."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


def export_run(
    config: MergeConfig | ExportConfig, out: Path, kind: ArtefactKind, gguf_type: GgufType, report: Listener = silent
) -> ExportResult:
    """Write, verify and name the artefact.

    Raises:
        NybbleError: nothing that looks complete is left.
    """
    unverified = out.with_name(out.name + ".unverified")
    for path in (out, unverified):
        _check_free(path)
    run, quality = config.run, config.rounding.quality
    assert run.run is not None
    opened = open_run(run.run, report)
    if opened.full:
        _refuse_adapter_ways(opened, run.onto, kind)
    task = opened.source.task
    if task.prompted or not task.writes:
        check_form(opened, kind)
    if opened.source.task.kind == "pictured":
        _check_pictured(kind)
    artefact = Artefact(kind, gguf_type, _choose_base(run.onto, kind, gguf_type))
    validation = evaluation_rows(opened, run.data, config.data.allow)  # first: without them all else is in vain
    calibration = rounding_input(opened, config.rounding, validation, report) if kind.is_rounded else None
    with disk_errors(out, ExportError):
        survival = write(opened, artefact, unverified, rounding=quality, calibration=calibration, report=report)
    if not task.writes:
        check = verify_embeddings if task.kind == "states" else verify_scores
        verification = check(opened, kind, unverified, validation, report)
    else:
        verification = verify(opened, artefact, unverified, validation, run.verify_positions, report)
    rounded = {"quality": quality if kind.is_rounded else None, "delta_survival": survival}
    found = {"kind": kind, "onto": artefact.onto, **rounded, **verification.to_json()}
    report(Verified(verification))
    with disk_errors(out, ExportError):
        (unverified / REPORT).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        fsync(unverified / REPORT)
        if not verification.passed:
            failed = f"Not verified: {unverified} is kept for you to look at."
            report(Note(failed if verification.outcome == "failed" else _undecided(unverified, verification)))
            return ExportResult(unverified, verification)
        if out.is_dir():  # empty, as was checked
            out.rmdir()
        os.rename(unverified, out)
        fsync(out.parent)
    for note in opened.source.notes:
        report(Note(note))
    report(Note(f"{out} holds the tuned model of {run.run}, verified."))
    return ExportResult(out, verification)


def write(
    opened: OpenRun,
    artefact: Artefact,
    out: Path,
    *,
    rounding: Rounding = "absmax",
    calibration: CalibrationInput | None = None,
    report: Listener = silent,
) -> float | None:
    """Write the artefact; returns how much of ΔW arrived, where the weights were rounded to four bits.

    Args:
        rounding: of a rounded artefact.
        calibration: for rounding "calibrated".
    """
    if artefact.kind.is_adapter:
        MergedSource(opened, "original")  # refuses an adapter that is not whole, finite and for this base
        with staged_folder(out) as staging:
            (_write_peft if artefact.kind is ArtefactKind.PEFT else _write_gguf_adapter)(opened, staging)
        return None
    merging = None if opened.full else MergedSource(opened, artefact.onto)
    merged = merging or opened.tuned
    _check_space(out, _bytes(merged, artefact))
    if artefact.kind is ArtefactKind.GGUF:
        with staged_folder(out) as staging:
            gguf_model.write_gguf_model(
                merged, artefact.gguf_type, opened.template, staging / gguf_model.MODEL_FILE, report
            )
            _write_modelfile(staging, f"./{gguf_model.MODEL_FILE}", opened)
        return None
    if artefact.kind is ArtefactKind.DENSE:
        save_dense_folder(merged, out, report=report)
        return None
    quantize_folder(
        merged,
        merged_formats(opened),
        out,
        rounding=rounding,
        calibration=calibration,
        max_dense_share=opened.config.weights.max_dense_share,
        what="writing",
        report=report,
    )
    if merging is None:
        return None
    survival = merging.survival(open_model(str(out)))
    report(Note(f"{survival:.1%} of ΔW survived the rounding to four bits."))
    return survival


def verify(
    opened: OpenRun,
    artefact: Artefact,
    folder: Path,
    validation: Sequence[EncodedExample],
    positions: int,
    report: Listener = silent,
) -> Verification:
    """Load the run, ask it, let it go, load the artefact, ask it, and compare."""
    dtype = _verifying_dtype(opened)
    model = load_tuned(opened, dtype, CPU, report)
    reference = ask_run(opened, model, validation, positions)
    del model
    gc.collect()  # modules refer to each other, and the next model needs the room
    longest = max(len(row.ids) for row in reference.rows)
    context = max([longest, *(len(prompt.ids) + ANSWER_TOKENS for prompt in reference.prompts)]) + 1
    try:
        consumer = load_consumer(artefact.kind, opened, folder, dtype, context, report)
        layers_asked = artefact.kind is ArtefactKind.DENSE and not opened.full
        found = compare(reference, consumer, artefact.faithfulness, layers_asked=layers_asked)
        if opened.full:
            return found
        merged = MergedSource(opened, artefact.onto)
        arrived = deltas_arrived(merged, artefact.kind, folder, consumer, artefact.gguf_type)
        return replace(found, checks=[*found.checks, *arrived])
    except Exception as error:  # whatever the consumer raises, the artefact is then not verified
        return not_loaded(artefact.kind, error)


def _check_pictured(kind: ArtefactKind) -> None:
    """Refuse what a model that reads pictures is not written as.

    Raises:
        ExportError: it is that.
    """
    allowed = (ArtefactKind.PEFT, ArtefactKind.DENSE)
    if kind not in allowed:
        raise ExportError(
            f"The run is of a model that reads pictures; {kind} holds its language model alone.",
            f"Allowed: {', '.join(allowed)}.",
            "`nybble merge --run RUN --out FOLDER` writes the whole model in 16 bits; from that folder llama.cpp's own "
            "converter makes a GGUF file of its language model, and one of its vision tower (--mmproj).",
        )


def _undecided(folder: Path, verification: Verification) -> str:
    return (
        f"Undecided: the run changed too little to tell its artefact from its base ({verification.too_little}). "
        f"Nothing else speaks against it; {folder} is kept and can be used.\n"
        "Train for more steps or with a higher --lr and export again, or measure on more tokens: --verify-positions, "
        "and --data with rows that the run was not trained on."
    )


def _choose_base(onto: str, kind: ArtefactKind, gguf_type: GgufType) -> Onto:
    """Rounding back onto the lattice that was trained on swallows ΔW, so four bits start from the original."""
    if onto != "auto":
        return "original" if onto == "original" else "dequantized"
    in_four_bits = kind.is_rounded or (kind is ArtefactKind.GGUF and gguf_type.in_four_bits)
    return "original" if in_four_bits else "dequantized"


def _verifying_dtype(opened: OpenRun) -> torch.dtype:
    """fp32, whose rounding hides nothing, where the artefact fits into half the free memory in it; else bf16."""
    num_bytes = 4 * sum(parameter.numel() for parameter in opened.source.skeleton.parameters())
    return torch.float32 if num_bytes <= available_bytes(CPU) // 2 else torch.bfloat16


def _write_peft(opened: OpenRun, folder: Path) -> None:
    """The adapter, rsLoRA's factor folded into alpha: every consumer scales by alpha / rank, not all know rsLoRA, nor
    PiSSA.
    """
    write_plain_adapter(StoredAdapter(opened.run.adapter, on_original=True), opened.source.skeleton, folder)
    if (opened.run.adapter / CARD).is_file():
        shutil.copyfile(opened.run.adapter / CARD, folder / CARD)
    save_tokenizer(opened.template.with_template(), folder)
    opened.source.save_processor(folder)


def _write_gguf_adapter(opened: OpenRun, folder: Path) -> None:
    adapter = StoredAdapter(opened.run.adapter, on_original=True)
    gguf_model.write_gguf_adapter(adapter, opened.source, folder / gguf_model.ADAPTER_FILE)
    base = Path(opened.source.name).absolute()
    named = str(base) if base.suffix == ".gguf" else "./BASE.gguf"  # for the user to put there
    _write_modelfile(folder, named, opened, f"./{gguf_model.ADAPTER_FILE}")


def _write_modelfile(folder: Path, model: str, opened: OpenRun, adapter: str | None = None) -> None:
    (folder / "Modelfile").write_text(modelfile(model, opened.template, adapter), encoding="utf-8")


def _refuse_adapter_ways(opened: OpenRun, onto: str, kind: ArtefactKind) -> None:
    """Refuse what only a run with adapters has.

    Raises:
        ExportError: so it is.
    """
    if kind.is_adapter or onto != "auto":
        raise ExportError(
            f"{opened.run.path} trained every weight, and {f'--to {kind}' if kind.is_adapter else '--onto'} is for "
            "adapters.",
            f"Allowed: {', '.join(each for each in ArtefactKind if not each.is_adapter)}; it is a whole model already.",
            f"{opened.run.model} holds it in 16 bits, for transformers and all that reads its folders.",
        )


def _bytes(merged: StoredModel, artefact: Artefact) -> int:
    if artefact.kind is ArtefactKind.GGUF:
        check_family(merged.config)
        return gguf_model.gguf_bytes(merged, artefact.gguf_type)
    return 2 * sum(p.numel() for p in merged.skeleton.parameters())  # an upper limit for four bits


def _check_space(out: Path, num_bytes: int) -> None:
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes + SPARE_BYTES:
        raise ExportError(
            f"{out} needs up to {(num_bytes + SPARE_BYTES) / 1e9:.1f} GB; {free / 1e9:.1f} GB are free.",
            "",
            "Free space on that disk, or choose another --out.",
        )


def _check_free(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ExportError(
            f"{path} already exists.",
            "The output must be a new or empty folder.",
            "Remove it, or choose another --out.",
        )
