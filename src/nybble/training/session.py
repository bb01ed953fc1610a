"""A training run from its config to its folder: open, audit, load, predict, train, record."""

import json
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from nybble import __version__
from nybble.data.encoded_rows import lengths_of
from nybble.data.plots import draw_lengths
from nybble.data.sampler import StepSampler, split_micro_batches
from nybble.errors import RunError
from nybble.events import Listener, all_of, silent
from nybble.files.disk import disk_errors, remove_folder, write_complete
from nybble.files.spool import Chosen
from nybble.kernels.heap import trim_heap
from nybble.layers.batch_model import BatchModel
from nybble.layers.causal_lm import CausalLM
from nybble.memory.measure import PeakMemory, has_own_memory
from nybble.options.option import flat, with_options
from nybble.options.verbs import TrainConfig
from nybble.planning.planner import Plan, forward_seconds
from nybble.planning.request import check_peak
from nybble.runs.base import RoundingChoice
from nybble.runs.events import EventLog, read_events
from nybble.runs.folder import RunFolder
from nybble.runs.formats import write_formats
from nybble.runs.plan_file import write_plan
from nybble.runs.result import RunResult
from nybble.runs.task_file import task_text
from nybble.runs.trained import Trained, TrainedAdapters, TrainedWeights
from nybble.sources.task import TOKENS
from nybble.sources.tokenizer import save_tokenizer
from nybble.training.base import Base, choose_base
from nybble.training.checkpoint import Checkpoints
from nybble.training.events import (
    AdapterTaken,
    Resumed,
    RunMeasured,
    RunStarted,
    TrainingBegun,
    TrainingEnded,
)
from nybble.training.fit import Fit, attach, choose_path, load_base, plan_fit
from nybble.training.loop import LoopResult, Rehearsal, train_loop
from nybble.training.objectives import asks_before
from nybble.training.plots import draw_loss
from nybble.training.rank import bound_rank
from nybble.training.reference import ADAPTER, References, ask_reference
from nybble.training.start import Examples, Opened, choose_method, open_start, take_examples
from nybble.training.sweep import choose_lr
from nybble.training.teacher import with_teacher
from nybble.training.tracking import Tracking


def train(config: TrainConfig, report: Listener = silent) -> RunResult:
    """Run `config` to its end or to the user's Ctrl-C; the adapter then lies in `<out>/adapter`, or the model in
    `<out>/model`.

    Raises:
        NybbleError: anything the user can mend; an earlier run's folder is untouched unless training began.
    """
    run = RunFolder(config.run.out)
    refused = (
        "A run needs files that can be read and a folder that can be written.",
        f"Mend what is wrong; a run that had begun goes on with: nybble train --resume --out {run.path}",
    )
    with run.locked(), disk_errors(run.path, RunError, *refused, what="cannot be read or written"):
        run.check_resumable() if config.run.resume else run.check_free(config.run.overwrite)
        with run.started(), EventLog(run.starting.events) as log:
            told = all_of(log, report)
            with Tracking(config.run.track, config.run.track_project, run, told) as tracking:
                return _train(config, run, log, all_of(told, tracking))


def _train(config: TrainConfig, run: RunFolder, log: EventLog, report: Listener) -> RunResult:
    """The whole run, from top to bottom."""
    report(RunStarted(config.model.model, config.data.data, config.run.resume))
    opened = open_start(config, run, report)
    opened, examples = take_examples(opened, report)
    opened = bound_rank(opened, examples, report)
    opened, examples = choose_method(opened, examples, report)
    examples = _taught(opened, examples, report)
    base = choose_base(opened, examples, report)
    with PeakMemory(opened.device) as memory:
        fit = plan_fit(opened, examples, base, report)
        model = load_base(opened, base, fit, report)
        opened = attach(opened, examples, base, fit, model, report)
        fit, causal_lm = choose_path(opened, examples, base, fit, model, report)
        trim_heap()  # what loading took and freed
        _move_in(opened, examples, base, log)
        examples = _with_reference(opened, examples, base, fit, causal_lm, report)
        started = time.perf_counter()
        result = _take_steps(opened, examples, base, fit, causal_lm, log, report)
        training_s = time.perf_counter() - started
    report(TrainingEnded(result.steps, result.interrupted is not None, memory.peak_bytes))
    step_s = _median_step_s(run)
    measured = {"peak_bytes": memory.peak_bytes, "start_bytes": memory.start_bytes, "step_s": step_s}
    measured |= {"reserved_bytes": memory.reserved_bytes} if has_own_memory(opened.device) else {}
    write_plan(run.plan, fit.plans, causal_lm.name, base.rounding, measured)
    _record(opened, examples)
    if result.interrupted is None and run.encoded.is_dir():
        remove_folder(run.encoded)
    plan = fit.plan
    losses = result.loss_before, result.loss_after
    report(RunMeasured(result.steps, training_s, memory.peak_bytes, plan.peak_bytes, step_s, plan.step_s, *losses))
    return RunResult(
        folder=run,
        config=opened.config,
        steps=result.steps,
        loss_before=result.loss_before,
        loss_after=result.loss_after,
        interrupted=result.interrupted,
        peak_memory_bytes=memory.peak_bytes,
        source=opened.source,
        model=model,
        streamed=fit.store is not None,
        template=opened.template,
        validation=examples.data.validation,
    )


# ---- the folder, the steps, the record


def _move_in(opened: Opened, examples: Examples, base: Base, log: EventLog) -> None:
    """Write what the run keeps, and let it take its folder.

    An earlier run goes only now, when nothing about the model can be refused any more.
    """
    run, starting = opened.run, opened.run.starting
    record = {"model": opened.source.name, "fingerprint": examples.base, "nybble": __version__}
    write_complete(starting.config, opened.options)
    if base.mixed is not None:
        write_formats(starting.formats, base.mixed)
    write_complete(starting.base_record, json.dumps(record, indent=2) + "\n")
    if opened.source.task is not TOKENS:
        write_complete(starting.task, task_text(opened.source.task))
    if opened.template.chat_template is not None:
        write_complete(starting.chat_template, opened.template.chat_template)
    write_complete(starting.audit, json.dumps(examples.data.audit.to_json(), indent=2) + "\n")
    examples.digests.write(starting.data_rows)
    if opened.config.objective.objective == "distill" and not opened.config.run.resume:
        starting.asked_teacher.rename(starting.teacher)
    if starting.encoding.is_dir() and not opened.config.run.resume:  # else it is of a run that never began
        starting.encoding.rename(starting.encoded)
    if not opened.config.run.resume:
        run.clear(opened.config.run.overwrite)
    run.move_in(log, 0 if opened.resumed is None else opened.resumed.state["events_bytes"])


def _taught(opened: Opened, examples: Examples, report: Listener) -> Examples:
    """The rows with what a teacher says of them, where there is one: it is asked before the student is loaded."""
    if opened.config.objective.objective != "distill":
        return examples
    return with_teacher(opened, examples, Chosen(examples.data.train, _met(opened, examples)), report)


def _with_reference(
    opened: Opened, examples: Examples, base: Base, fit: Fit, model: BatchModel, report: Listener
) -> Examples:
    """The rows with what the model that training begins with says of them, where the objective asks it beforehand."""
    if not asks_before(opened.config.objective):
        return examples
    assert isinstance(model, CausalLM)
    data, evaluations = examples.data, examples.evaluations
    made_of = (examples.base, base.formats, base.rounding and base.rounding.rounding, opened.dtype)
    references = References.open(opened.run.reference, ", ".join(map(str, made_of)), _begins_with(opened))
    ask_reference(
        references,
        model,
        (Chosen(data.train, _met(opened, examples)), evaluations.rows),
        micro_batch_size=fit.plan.micro_batch_size,
        resumed=opened.resumed is not None,
        seconds_of=partial(forward_seconds, fit.plan.run, fit.plans.machine),
        report=report,
    )
    evaluations = replace(evaluations, rows=references.attached(evaluations.rows))
    return replace(examples, data=data.changed(references.attached), evaluations=evaluations)


def _met(opened: Opened, examples: Examples) -> np.ndarray:
    """The training rows that the steps meet."""
    data, rows_per_step = examples.data, opened.config.memory.rows_per_step
    sampler = StepSampler(len(data.train), rows_per_step, opened.config.data.seed, data.mixture)
    met: set[int] = set()
    for _ in range(examples.num_steps):
        met.update(sampler.next_step())
        if len(met) == len(data.train):
            break
    return np.array(sorted(met), dtype=np.int64)


def _begins_with(opened: Opened) -> str:
    """The adapter that training begins with; empty where that does nothing to the base."""
    adapters = opened.config.adapters
    if not adapters.begins_with_an_effect:
        return ""
    if adapters.adapter is None:
        return f"init {adapters.init}"
    return ADAPTER if opened.continued is None else f"{ADAPTER} {opened.continued.fingerprint()}"


def _take_steps(
    opened: Opened,
    examples: Examples,
    base: Base,
    fit: Fit,
    causal_lm: BatchModel,
    log: EventLog,
    report: Listener,
) -> LoopResult:
    """Train, with checkpoints."""
    run, config, resumed = opened.run, opened.config, opened.resumed
    data, plan = examples.data, fit.plan
    done = None if resumed is None else resumed.step
    if opened.continued is not None:
        report(AdapterTaken(str(opened.continued.folder), opened.continued.fingerprint()))
    if resumed is not None:
        report(Resumed(resumed.step))
    trained = _trained(opened, causal_lm)
    loop = partial(
        train_loop,
        causal_lm,
        examples.objective,
        data.train,
        optimizer_bits=config.memory.optimizer_bits,
        micro_batch_size=plan.micro_batch_size,
        trained=trained,
        events_bytes=log.sync,
        paged=plan.paged,
        graphs=plan.run.graphs,
        rehearsal=None if config.memory.memory is None else _rehearsal(examples, fit, causal_lm.packed),
    )
    rate = choose_lr(opened, examples, causal_lm, trained, loop, plan.micro_batch_size, report)
    if rate.interrupted is not None:  # what is trained is as training would have begun
        trained.publish(causal_lm.module, run)
        return LoopResult(0, None, None, rate.interrupted)
    settled = _settled(opened, plan, base.rounding, rate.lr)
    checkpoints = Checkpoints(
        run.checkpoints,
        save_every=config.loop.save_every,
        keep=config.loop.keep_checkpoints,
        config=opened.options,
        about={
            "base": examples.base,
            "data": examples.digests.fingerprint,
            "evaluated_rows": len(examples.evaluations.rows),
        },
        settled=settled,
        last_step=done,
    )
    report(TrainingBegun(examples.num_steps, done, flat(with_options(config, **settled), "json")))
    return loop(
        examples.evaluations,
        config.loop,
        lr=rate.lr,
        sampler=StepSampler(len(data.train), config.memory.rows_per_step, config.data.seed, data.mixture),
        total_steps=examples.num_steps,
        run=run,
        report=report,
        checkpoints=checkpoints,
        resumed=resumed,
    )


def _trained(opened: Opened, causal_lm: BatchModel) -> Trained:
    if opened.config.method.method == "full":
        return TrainedWeights(opened.source, opened.template)
    return TrainedAdapters.of(causal_lm.module, opened.config.model.model)


def _median_step_s(run: RunFolder) -> float:
    """Over all sessions of the run; 0 where no step was taken."""
    steps = sorted(event["step_s"] for event in read_events(run.events, "step"))
    return steps[len(steps) // 2] if steps else 0.0


def _record(opened: Opened, examples: Examples) -> None:
    """The tokenizer beside what was trained, and pictures."""
    run = opened.run
    trained = run.trained(opened.config.method.method == "full")
    save_tokenizer(opened.template.with_template(), trained)
    opened.source.save_processor(trained)
    draw_loss(run.events, run.loss_plot)
    draw_lengths(examples.data.lengths(), opened.config.data.max_seq_len, run.lengths_plot)


def _settled(opened: Opened, plan: Plan, rounding: RoundingChoice | None, lr: float) -> dict[str, Any]:
    """What was chosen for options that choose for themselves: a resumed run computes with the same, to the bit."""
    settled: dict[str, Any] = {
        "keep": plan.keep,
        "whole_blocks": plan.whole_blocks,
        "micro_batch_size": plan.micro_batch_size,
        "stream_base": "never" if plan.resident_blocks is None else "always",
        "page_optimizer": "always" if plan.paged else "never",
        "offload_activations": "always" if plan.offloaded else "never",
        "threads": torch.get_num_threads(),
        "compute_dtype": {torch.bfloat16: "bf16", torch.float32: "fp32"}[opened.dtype],
        "device": opened.device.type,
    }
    settled |= {} if rounding is None else {"quality": rounding.rounding}
    adapters = opened.config.adapters
    settled |= {"lr": lr} if opened.given.loop.lr == "auto" else {}
    settled |= {"rank": adapters.settled_rank} if opened.given.adapters.rank == "auto" else {}
    given_out = ("target_modules", "rank_pattern", "alpha_pattern") if adapters.eva_rho > 1 else ()
    return settled | {name: getattr(adapters, name) for name in given_out}


def _rehearsal(examples: Examples, fit: Fit, packed: bool) -> Rehearsal:
    """The rows of the largest micro-batches that the run will meet."""
    plans, train, held_out = fit.plans, examples.data.train, examples.evaluations.rows
    assert plans.chosen is not None
    dealt = split_micro_batches(range(len(held_out)), lengths_of(held_out), plans.chosen.micro_batch_size, packed)
    return Rehearsal(
        [train[row] for row in plans.chosen.batches.heaviest],
        [held_out[row] for row in (dealt[0] if dealt else ())],  # the heaviest comes first
        partial(check_peak, plans, fit.unconstrained),
    )
