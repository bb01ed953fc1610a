"""The teacher of a distilled run: asked once about every row that the run will meet, before the student is loaded.

What it says lies in the run folder (`data/row_records.py`) and is read from there whenever a row is. The teacher is
read forward only, alone in memory or block by block, and gone before the student comes.
"""

import gc
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nybble.data import packing
from nybble.data.encoded_rows import ChangedRows, EncodedRows, counted, lengths_of, supervised_of
from nybble.data.examples import EncodedExample, extended
from nybble.data.row_records import RowRecords, described
from nybble.data.sampler import split_micro_batches
from nybble.errors import ConfigError, FormatError, RunError
from nybble.events import Listener, Note
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.kernels.heap import trim_heap
from nybble.layers.causal_lm import CausalLM
from nybble.layers.distillation import likeliest
from nybble.memory.allocators import allocator
from nybble.memory.measure import PeakMemory, has_own_memory
from nybble.memory.store import open_store
from nybble.planning.asked import TOP_K, AskedModel, AskedPlan, Asking, plan_asking
from nybble.planning.machine import this_machine
from nybble.planning.machine_table import Machine
from nybble.planning.request import plan_run
from nybble.sources.load import load_model
from nybble.sources.open import open_model
from nybble.sources.stored_model import StoredModel
from nybble.training.distill import TaughtExample
from nybble.training.events import TeacherAsked
from nybble.training.objectives import mixture_of
from nybble.training.reference import as_evaluated
from nybble.training.start import Examples, Opened
from nybble.training.teacher_tokens import check_tokens
from nybble.units import format_bytes

WORDS = {"top_k": "teacher-top-k", "temperature": "distill-temperature"}  # of what records are about


@dataclass(frozen=True)
class Question:
    """What a teacher is asked, and how: what its answers depend on.

    Args:
        teacher: fingerprint.
        format, dtype: of its weights and of what is computed.
        rows_at_once: that are computed together.
        top_k: tokens of each distribution. vocabulary: of so many that the student knows too. temperature: they are at.
    """

    teacher: str
    format: str
    dtype: str
    rows_at_once: int
    top_k: int
    vocabulary: int
    temperature: float


class Taught:
    """What a teacher says of rows, on the disk.

    Args:
        records: of this question.
    """

    def __init__(self, records: RowRecords, question: Question):
        self.records, self.question = records, question

    @classmethod
    def open(cls, folder: Path) -> "Taught | None":
        """What a run's folder holds; None where there is nothing."""
        about = described(folder)
        return None if about is None else cls(RowRecords(folder, about), Question(**about))

    def ask(self, model: CausalLM, rows: Sequence[EncodedExample], report: Listener) -> None:
        """Ask the teacher about those rows that are not known."""
        with torch.no_grad(), as_evaluated(model):
            self.records.ask(rows, lambda part: self._answers(model, part), "asking the teacher", report)

    def _answers(self, model: CausalLM, rows: Sequence[EncodedExample]) -> Iterator[tuple[EncodedExample, bytes]]:
        asked, lengths = self.question, [len(row) for row in rows]
        for micro in split_micro_batches(range(len(rows)), lengths, asked.rows_at_once, model.packed):
            part = [rows[i] for i in micro]
            batch = packing.collate(part, model.packed).to(model.device)
            said = likeliest(model.head, model.hidden(batch), asked.top_k, asked.vocabulary, asked.temperature)
            counts = [row.supervised_tokens for row in part]
            for row, ids, log_p in zip(part, said.ids.split(counts), said.log_p.split(counts), strict=True):
                yield row, ids.int().numpy().tobytes() + log_p.half().numpy().tobytes()

    def attached(self, rows: Sequence[EncodedExample]) -> EncodedRows:
        """The rows, with what the teacher says of each, where it was asked."""
        return ChangedRows(counted(rows), lambda number, row: self._taught(row))

    def _taught(self, row: EncodedExample) -> EncodedExample:
        if (content := self.records.read(row)) is None:
            return row
        targets, top_k = row.supervised_tokens, self.question.top_k
        border = 4 * targets * top_k
        ids = np.frombuffer(content[:border], dtype=np.int32).reshape(targets, top_k)
        log_p = np.frombuffer(content[border:], dtype=np.float16).reshape(targets, top_k + 1)
        said = {"teacher_ids": torch.from_numpy(ids.copy()), "teacher_log_p": torch.from_numpy(log_p.copy())}
        return extended(row, TaughtExample, **said)


@dataclass(frozen=True)
class Teacher:
    """A teacher that is asked, or was.

    Args:
        plan: how it is, or would be.
    """

    source: StoredModel
    plan: AskedPlan
    machine: Machine
    question: Question


def with_teacher(opened: Opened, examples: Examples, met: Sequence[EncodedExample], report: Listener) -> Examples:
    """The rows with what the teacher says of them, which is asked about those that it was not asked about yet.

    Args:
        met: the training rows that the run's steps will meet.

    Raises:
        ConfigError: its tokens are not the student's.
        RunError: the run goes on, and began with another teacher; or the disk is full.
        PlanError: it does not fit.
    """
    run, evaluations = opened.run, examples.evaluations
    folder = run.teacher if opened.config.run.resume else run.starting.asked_teacher
    parts = (met, evaluations.rows)
    teacher = choose_teacher(opened, examples, parts, described(folder), report)
    taught = Taught(RowRecords(folder, asdict(teacher.question)), teacher.question)
    unknown = [taught.records.unknown(rows) for rows in parts]
    if any(map(len, unknown)):
        _ask(opened, teacher, taught, parts, unknown, report)
    evaluations = replace(evaluations, rows=taught.attached(evaluations.rows))
    return replace(examples, data=examples.data.changed(taught.attached), evaluations=evaluations)


def choose_teacher(
    opened: Opened,
    examples: Examples,
    parts: Sequence[Sequence[EncodedExample]],
    before: dict[str, Any] | None,
    report: Listener,
) -> Teacher:
    """Open the teacher, compare its tokens, and plan how it is asked.

    Args:
        before: what there are answers to already.
    """
    config, options = opened.config, opened.config.objective
    assert options.teacher is not None
    source = open_teacher(options.teacher, report)
    theirs, ours = vocabulary_of(source), vocabulary_of(opened.source)
    check_tokens(source, opened.template.tokenizer, parts, theirs)
    settled: dict[str, Any] = {
        "teacher": source.fingerprint(),
        "dtype": str(opened.dtype).removeprefix("torch."),
        "top_k": min(options.teacher_top_k or TOP_K, theirs, ours),
        "vocabulary": min(theirs, ours),
        "temperature": mixture_of(options).temperature,
    }
    same = before is not None and all(before.get(name) == value for name, value in settled.items())
    format = options.teacher_format or "auto"
    if before is not None and same and format == "auto":
        format = before["format"]
    memory = config.memory.memory
    if memory is not None:  # what never fits is refused before minutes are spent on asking
        plan_run(config, opened.source, None, examples.micro_batches, opened.dtype, opened.device, folder_to_come=True)
    files = () if source.quant_spec is None else source.files
    machine = this_machine(opened.device, opened.dtype, memory, model_files=files)
    plan = plan_asking(
        AskedModel.of(source),
        format,
        examples.micro_batches,
        machine,
        opened.dtype,
        packing=config.memory.packing,
    )
    rows_at_once = before["rows_at_once"] if before is not None and same else plan.rows_at_once
    question = Question(format=plan.format, rows_at_once=rows_at_once, **settled)
    _check_unchanged(opened, before, question, report)
    return Teacher(source, plan, machine, question)


def open_teacher(name: str, report: Listener) -> StoredModel:
    """The model in the bits that it is stored in, where these are computed with as they are; else in 16."""
    source = open_model(name, None, report)
    try:
        return source.as_stored()
    except FormatError:  # in 16 bits, or in blocks that are widened
        return source


def vocabulary_of(source: StoredModel) -> int:
    """How many logits a state gets.

    Raises:
        ConfigError: the model gives none.
    """
    head = source.skeleton.get_output_embeddings()
    if head is None:
        raise ConfigError(
            f"teacher is {source.name!r}, which gives no logits.",
            "A teacher is a causal language model.",
            "Choose another --teacher.",
        )
    return int(head.weight.shape[0])


def _check_unchanged(opened: Opened, before: dict[str, Any] | None, question: Question, report: Listener) -> None:
    """Say why the teacher is asked anew, if it is.

    Raises:
        RunError: the run goes on, its teacher is another, and "base" is not among what may change.
    """
    now = asdict(question)
    if before is None or before == now:
        return
    changed = [name for name, value in now.items() if before.get(name) != value]
    said = "; ".join(f"{WORDS.get(name, name)} was {before.get(name)}, is {now[name]}" for name in changed)
    if opened.resumed is not None and "teacher" in changed and "base" not in opened.config.run.allow_change:
        raise RunError(
            f"The run began with another teacher: {said}.",
            "A run goes on with the teacher that it began with.",
            "Restore it, start a new run, or insist with --allow-change base: then it is asked anew.",
        )
    report(Note(f"the teacher is asked anew: {said}"))


def _ask(
    opened: Opened,
    teacher: Teacher,
    taught: Taught,
    parts: Sequence[Sequence[EncodedExample]],
    unknown: Sequence[np.ndarray],
    report: Listener,
) -> None:
    """Load the teacher, ask it, and let go of it."""
    plan, question, device, machine = teacher.plan, teacher.question, opened.device, teacher.machine
    counts = [len(numbers) for numbers in unknown]
    tokens, targets = (
        sum(int(count(part)[numbers].sum()) for part, numbers in zip(parts, unknown, strict=True))
        for count in (lengths_of, supervised_of)
    )
    asking = Asking.of(teacher.source.name, plan, machine, sum(counts), tokens, targets, question.top_k)
    if opened.config.memory.memory is not None or not machine.on_cpu:  # a processor has more than is free
        asking.check()
    folder = taught.records.folder
    if asking.file_bytes > (free := shutil.disk_usage(folder).free):
        raise RunError(
            f"{folder} is on a disk with {format_bytes(free)} free.",
            f"What the teacher says of {targets} tokens takes {format_bytes(asking.file_bytes)}.",
            "Make room, choose an --out on another disk, or lower --teacher-top-k.",
        )
    report(Note(f"asking the teacher about {sum(counts)} rows once; {asking.describe()}"))
    started = time.perf_counter()
    with PeakMemory(device) as memory:
        model = _load(opened, teacher, report)
        for part, count in zip(parts, counts, strict=True):
            if count:
                taught.ask(model, part, report)
        del model
        gc.collect()  # modules refer to each other, and the student needs the room
        trim_heap()
        if has_own_memory(device):
            allocator(device).empty_cache()
    elapsed = time.perf_counter() - started
    took = elapsed, asking.seconds, memory.peak_bytes, plan.peak_bytes
    report(TeacherAsked(asking.name, question.format, sum(counts), tokens, *took))


def _load(opened: Opened, teacher: Teacher, report: Listener) -> CausalLM:
    """The teacher, frozen, as it is planned."""
    source, plan = teacher.source, teacher.plan
    formats = source.layer_formats
    if formats is None and plan.format != "none":
        formats = BaseFormats(QuantSpec(plan.format))
    store = None
    if plan.resident_blocks is not None:
        store = open_store(source, plan.resident_blocks, opened.device, in_ram=plan.run.from_ram)
    model = load_model(
        source,
        formats,
        opened.dtype,
        opened.device,
        stream_linears_of=() if store is None else source.streamed_layers,
        stream_ends=plan.run.stream_ends,
        report=report,
    )
    return CausalLM.of(model, packing=opened.config.memory.packing, store=store)
