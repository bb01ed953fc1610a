"""A training run from its config to its folder: open, audit, load, predict, train, record."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch

from nybble import __version__, openmp
from nybble.data.audit import Audited
from nybble.data.calibration_text import CalibrationText
from nybble.data.encoded_rows import counted
from nybble.data.new_tokens import describe_tokens, untrained_tokens
from nybble.data.plots import draw_lengths
from nybble.data.prepare import PreparedData
from nybble.data.sampler import StepSampler
from nybble.data.template import ChatTemplate, open_template
from nybble.errors import ConfigError, PlanError, RunError
from nybble.events import Listener, Note, all_of, silent
from nybble.files.disk import disk_errors, write_complete
from nybble.files.spool import Chosen
from nybble.formats.quant_spec import BaseFormats
from nybble.kernels.heap import trim_heap
from nybble.layers.backbone import KeptTensors, why_not_blocks
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import adapters_of, add_new_adapters, describe_untouched, new_adapter_sizes
from nybble.layers.precision import set_up
from nybble.layers.token_rows import train_rows
from nybble.memory.measure import PeakMemory, has_own_memory, used_bytes
from nybble.memory.offload import activation_place
from nybble.memory.store import FolderBlockStore, open_store
from nybble.options.adapter_groups import TAKES_FROM_BASE
from nybble.options.groups import LoopOptions
from nybble.options.option import config_to_yaml, with_options
from nybble.options.verbs import TrainConfig
from nybble.planning.micro_batches import micro_batches_of, total_steps
from nybble.planning.planner import Plan, Plans, forward_seconds
from nybble.planning.report import Planned
from nybble.planning.request import check_peak, plan_run
from nybble.planning.run_shape import MicroBatches
from nybble.planning.strategies import PlanRequest, Strategy
from nybble.quantization.adapter_init import (
    STATISTICS_BYTES,
    check_initialisable,
    initialise_adapters,
    start_along_inputs,
)
from nybble.quantization.residual import ResidualSource
from nybble.quantization.sensitivity import MixedFormats, measure_formats, some_windows
from nybble.quantization.walk import WalkError
from nybble.runs.adapter_files import StoredAdapter, restore_adapter
from nybble.runs.adapter_writing import adapter_config
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
from nybble.runs.context import read_rows, within_context
from nybble.runs.continued import check_base_of, open_adapter, options_of
from nybble.runs.events import EventLog, read_events
from nybble.runs.folder import RunFolder
from nybble.runs.formats import write_formats
from nybble.runs.plan_file import write_plan
from nybble.runs.result import RunResult
from nybble.sizes import SHAPE_RULES
from nybble.sources.load import load_model
from nybble.sources.open import open_model
from nybble.sources.stored_model import StoredModel
from nybble.sources.tokenizer import save_tokenizer
from nybble.training.checkpoint import Checkpoint, Checkpoints, newest_checkpoint
from nybble.training.evaluations import Evaluations, plan_evaluations
from nybble.training.events import (
    AdapterTaken,
    ModelOpened,
    Resumed,
    RunMeasured,
    RunStarted,
    TrainingBegun,
    TrainingEnded,
)
from nybble.training.loop import LoopResult, Rehearsal, train_loop
from nybble.training.objective import Objective
from nybble.training.objectives import USUAL_LR, asks_before, make_objective, make_regularisers
from nybble.training.plots import draw_loss
from nybble.training.reference import ADAPTER, References, ask_reference
from nybble.training.resume import DataDigests, check_base, check_data, settle_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


INIT_TOKENS = 8192  # of the text that --init activation and eva take the layers' inputs from


def train(config: TrainConfig, report: Listener = silent) -> RunResult:
    """Run `config` to its end or to the user's Ctrl-C; the adapter then lies in `<out>/adapter`.

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
            return _train(config, run, log, all_of(log, report))


def _train(config: TrainConfig, run: RunFolder, log: EventLog, report: Listener) -> RunResult:
    """The whole run, from top to bottom."""
    report(RunStarted(config.model.model, config.data.data, config.run.resume))
    opened = _open(config, run, report)
    examples = _read_examples(opened, report)
    base = _choose_base(opened, examples, report)
    with PeakMemory(opened.device) as memory:
        fit = _plan(opened, examples, base, report)
        model = _load(opened, examples, base, fit, report)
        fit, causal_lm = _choose_path(opened, examples, base, fit, model, report)
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
    plan = fit.plan
    report(RunMeasured(result.steps, training_s, memory.peak_bytes, plan.peak_bytes, step_s, plan.step_s))
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


# ---- what the run starts from


@dataclass(frozen=True)
class _Opened:
    """What a run starts from.

    Args:
        run: its folder.
        config: options as the checkpoint, the adapter and the base settle them.
        given: those that the run folder keeps: what chooses for itself does so again.
        resumed: the checkpoint that the run goes on from.
        continued: the adapter that a new run trains on from.
    """

    run: RunFolder
    config: TrainConfig
    given: TrainConfig
    resumed: Checkpoint | None
    continued: StoredAdapter | None
    source: StoredModel
    template: ChatTemplate
    device: torch.device
    dtype: torch.dtype

    @property
    def options(self) -> str:
        """The text of the run's `config.yaml`."""
        return config_to_yaml(with_options(self.given, resume=False, allow_change=()))


def _open(given: TrainConfig, run: RunFolder, report: Listener) -> _Opened:
    """Checkpoint, base, adapter and template; the number of threads is set."""
    resumed = newest_checkpoint(run.checkpoints, report) if given.run.resume else None
    config = given if resumed is None else settle_config(resumed, given)
    adapters, allowed = config.adapters, config.run.allow_change
    device, dtype = set_up(config.machine)
    source = open_model(config.model.model, config.model.tokenizer, report)
    config = with_options(config, max_seq_len=within_context(config.data.max_seq_len, source))
    if adapters.init not in ("default", "eva"):
        check_initialisable(source, config.weights.format != "none")
    continued = None
    if adapters.adapter is not None and resumed is None:
        continued = open_adapter(adapters.adapter)
        config = given = with_options(config, **options_of(continued, adapters, source.skeleton))
        for note in check_base_of(continued, source, allowed):
            report(Note(note, warning=True))
    same_options = resumed is not None and "config" not in allowed
    template = open_template(config.data, source.load_tokenizer(), run.chat_template if same_options else None)
    return _Opened(run, config, given, resumed, continued, source, template, device, dtype)


@dataclass(frozen=True)
class _Examples:
    """What a run learns from, and for how long.

    Args:
        base: fingerprint of the base, as the run's records name it.
        micro_batches: most rows at once -> what the run's micro-batches come to.
    """

    data: PreparedData
    digests: DataDigests
    base: str
    objective: Objective
    new_tokens: tuple[int, ...]
    num_steps: int
    evaluations: Evaluations
    micro_batches: Callable[[int], MicroBatches]


def _read_examples(opened: _Opened, report: Listener) -> _Examples:
    """The rows, audited, and compared with those of the run that is gone on with."""
    config, source, resumed = opened.config, opened.source, opened.resumed
    allowed, rows_per_step = config.run.allow_change, config.memory.rows_per_step
    objective = make_objective(config.objective)
    data = read_rows(config.data, source, opened.template, objective.kind, opened.run.path, report)
    new_tokens: tuple[int, ...] = ()
    if config.adapters.train_new_tokens:
        data, new_tokens = _take_new_tokens(opened, data)
    report(ModelOpened(source.name, tuple(source.notes)))
    report(Audited(data.audit))
    data.audit.check()
    data = data.changed(lambda rows: counted(objective.complete(rows, config.data.seed, config.data.max_seq_len)))
    if config.objective.objective != "sft" and "lr" not in config.loop.model_fields_set:
        report(Note(f"lr is {config.loop.lr:g}, the default; preferences are usually learnt with {USUAL_LR}: --lr"))
    base, digests = source.fingerprint(), DataDigests.of(data)
    if resumed is not None:
        check_base(resumed, base, allowed)
        check_data(resumed, data, digests, allowed)
    num_steps = total_steps(config.loop, len(data.train), rows_per_step)
    begun_with = None if resumed is None else resumed.about.get("evaluated_rows")
    evaluations = plan_evaluations(
        config.data, config.loop.eval_every, data.train, data.validation, rows_per_step, num_steps, begun_with
    )
    if data.mixture is not None:
        report(Note(data.mixture.describe(num_steps * rows_per_step)))
    if not evaluations.rows:
        _refuse_without_evaluations(config.loop)
    if evaluations.note:
        report(Note(evaluations.note))
    micro_batches = _micro_batches(config, source, data, num_steps, opened.device)
    return _Examples(data, digests, base, objective, new_tokens, num_steps, evaluations, micro_batches)


def _take_new_tokens(opened: _Opened, data: PreparedData) -> tuple[PreparedData, tuple[int, ...]]:
    """The tokens whose rows are trained, and the rows without the finding that these are not.

    Raises:
        ConfigError: there are none.
    """
    template, source = opened.template, opened.source
    vocab_size, sequences = source.config.get_text_config().vocab_size, chain(data.train, data.validation)
    tokens = untrained_tokens(sequences, template.tokenizer, template.chat_template, vocab_size, source.embedding_rows)
    if not tokens:
        raise ConfigError(
            "train-new-tokens is on, and the rows have no token that the base never learnt.",
            "New are tokens added to the tokenizer that its template does not mention, or with rows never trained.",
            "Leave --train-new-tokens out.",
        )
    findings = tuple(found for found in data.audit.findings if found.id != "untrained-tokens")
    notice = f"rows of {describe_tokens(tokens, template.tokenizer)} are trained"
    audit = replace(data.audit, findings=findings, notices=(*data.audit.notices, notice))
    return replace(data, audit=audit), tuple(tokens)


def _refuse_without_evaluations(loop: LoopOptions) -> None:
    given = {"early-stopping-patience": loop.early_stopping_patience is not None, "keep-best": loop.keep_best}
    if asked := [name for name, there in given.items() if there]:
        raise ConfigError(
            f"{asked[0]} is given, and no row is held out.",
            "Which adapter is best is seen on held-out rows.",
            f"Hold rows out (--validation-data, --validation-fraction), or leave --{asked[0]} out.",
        )


def _micro_batches(
    config: TrainConfig, source: StoredModel, data: PreparedData, num_steps: int, device: torch.device
) -> Callable[[int], MicroBatches]:
    rules, packing, dropout = SHAPE_RULES[device.type], config.memory.packing, config.adapters.dropout > 0
    shares = why_not_blocks(source.skeleton, packing=packing, dropout=dropout, device=device) is None
    return micro_batches_of(data, config.memory, rules, steps=num_steps, seed=config.data.seed, shares=shares)


# ---- its base, in few bits


@dataclass(frozen=True)
class _Base:
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


def _choose_base(opened: _Opened, examples: _Examples, report: Listener) -> _Base:
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
        return _Base(source, formats, rounding, mixed)
    kept = None if begins else kept_base(opened.run)
    if kept is not None:
        return _Base(kept, formats, rounding, mixed)
    assert formats is not None
    if takes:
        residual = ResidualSource(source, config.adapters.init, new_adapter_sizes(source.skeleton, config.adapters))
        put, share = data_free_rounding(config.rounding), config.weights.max_dense_share
        made = make_residual_base(opened.run, residual, formats, put, share, report)
        return _Base(made, formats, rounding, mixed, residual)
    try:
        text = _calibration_text(opened, examples)
        share = config.weights.max_dense_share
        made = make_calibrated_base(opened.run, source, formats, text, dtype, share, report)
        return _Base(made, formats, rounding, mixed)
    except WalkError as error:
        instead = without_calibration(rounding, error)
        report(RoundingChosen(instead.rounding, instead.why))
        return _Base(source, formats, instead, mixed)


def _calibration_text(opened: _Opened, examples: _Examples) -> CalibrationText:
    config, data = opened.config, examples.data
    return run_calibration_text(
        config.rounding, config.data, opened.source, data.train, data.validation, opened.template
    )


def _measure_mixed(opened: _Opened, examples: _Examples, report: Listener) -> MixedFormats:
    """The formats of the base's layers, by what the model's answers on the calibration text would suffer."""
    bits, spec = opened.config.rounding.mixed, quant_spec(opened.config.weights)
    assert spec is not None and bits is not None
    windows = _calibration_text(opened, examples).windows
    return measure_formats(opened.source, bits, spec, windows, opened.dtype, opened.device, report)


# ---- how it fits, and the model in memory


@dataclass(frozen=True)
class _Fit:
    """How the run is made to fit.

    Args:
        unconstrained: what was asked, with every choice left to the planner.
        store: of a base that is streamed.
    """

    plans: Plans
    unconstrained: PlanRequest
    store: FolderBlockStore | None

    @property
    def plan(self) -> Plan:
        """On a CPU, without --memory, the smallest is tried in any case."""
        return self.plans.chosen or self.plans.smallest


def _plan(opened: _Opened, examples: _Examples, base: _Base, report: Listener) -> _Fit:
    """The plan, and the streamed base's store opened."""
    dtype, device = opened.dtype, opened.device
    count = len(examples.new_tokens)
    plans, unconstrained = plan_run(
        opened.config, base.source, base.formats, examples.micro_batches, dtype, device, new_tokens=count
    )
    report(Planned(plans, unconstrained))
    fit = _Fit(plans, unconstrained, None)
    return replace(fit, store=open_blocks(base.source, fit.plan, device))


def _load(opened: _Opened, examples: _Examples, base: _Base, fit: _Fit, report: Listener) -> "PreTrainedModel":
    """The frozen base with the adapters that training begins with."""
    config, plan, adapters = opened.config, fit.plan, opened.config.adapters
    model = load_model(
        base.source,
        base.formats,
        opened.dtype,
        opened.device,
        data_free_rounding(config.rounding),
        stream_linears_of=() if fit.store is None else fit.store.names,
        stream_ends=plan.stream_ends,
        report=report,
    )
    add_new_adapters(model, adapters, config.data.seed)
    if examples.new_tokens:
        train_rows(model, examples.new_tokens)
    if adapters.init in TAKES_FROM_BASE:
        for adapter in adapters_of(model).values():
            adapter.taken_by = adapters.init  # a checkpoint has what that was
    if adapters.init != "default" and opened.resumed is None:
        free = (plan.peak_bytes - used_bytes(opened.device)) // 2  # of what training takes; half for the windows' pass
        _begin_adapters(opened, examples, base, model, min(free, STATISTICS_BYTES))
    if opened.continued is not None:
        restore_adapter(model, opened.continued.folder)
    return model


def _begin_adapters(
    opened: _Opened, examples: _Examples, base: _Base, model: "PreTrainedModel", statistics_bytes: int
) -> None:
    """What --init says."""
    init = opened.config.adapters.init
    if init in TAKES_FROM_BASE:
        assert base.residual is not None
        for name, adapter in adapters_of(model).items():
            adapter.start_from(*base.residual.begun(name))
        return
    windows = None
    if init != "loftq":
        windows = some_windows(_calibration_text(opened, examples).windows, INIT_TOKENS)
    if init == "eva":
        assert windows is not None
        start_along_inputs(model, windows, statistics_bytes)
    else:
        initialise_adapters(model, opened.source, windows, statistics_bytes)


def _choose_path(
    opened: _Opened,
    examples: _Examples,
    base: _Base,
    fit: _Fit,
    model: "PreTrainedModel",
    report: Listener,
) -> tuple[_Fit, CausalLM]:
    """What computes the model; planned again where it cannot take rows side by side."""
    packing, plan = opened.config.memory.packing, fit.plan
    kept = _place_for_kept(plan, opened.run, opened.device)
    choose = partial(CausalLM.of, model, packing=packing, store=fit.store, kept=kept)
    causal_lm = choose(keep=plan.keep, whole_blocks=plan.whole_blocks)
    if causal_lm.packed != packing:
        fit = _plan_padded(opened, examples, base, fit)
        report(Note(f"planned again, for padded rows: {fit.plan.describe()}"))
        if fit.plan.keep != plan.keep:
            causal_lm = choose(keep=fit.plan.keep, whole_blocks=fit.plan.whole_blocks)
    causal_lm.regularise(make_regularisers(opened.config.objective))
    report(Note(f"computing through: {causal_lm.name}"))
    for note in describe_untouched(model):
        report(Note(note))
    if openmp.waiting == "unknown" and not has_own_memory(opened.device):
        report(Note(f"threads wait {openmp.SENTENCES['unknown']}", warning=True))
    return fit, causal_lm


def _plan_padded(opened: _Opened, examples: _Examples, base: _Base, packed: _Fit) -> _Fit:
    """Plans for rows that turned out not to go side by side; how the base was loaded stays.

    Raises:
        PlanError: they would need it loaded otherwise, or nothing fits.
    """
    loaded = packed.plan
    stream = "never" if loaded.resident_blocks is None else "always"
    padded = with_options(opened.config, packing=False, stream_base=stream)
    plans, unconstrained = plan_run(
        padded,
        base.source,
        base.formats,
        _micro_batches(padded, base.source, examples.data, examples.num_steps, opened.device),
        opened.dtype,
        opened.device,
        machine=packed.plans.machine,
        new_tokens=len(examples.new_tokens),
    )
    fit = _Fit(plans, unconstrained, packed.store)
    plan = fit.plan
    if (plan.resident_blocks, plan.offloaded) != (loaded.resident_blocks, loaded.offloaded):
        raise PlanError(
            "The plan is for rows side by side, which this model mixes, and padded rows need another.",
            f"What fits padded: {plan.describe()}.",
            "Plan for them from the beginning: add --no-packing.",
        )
    return fit


# ---- the folder, the steps, the record


def _move_in(opened: _Opened, examples: _Examples, base: _Base, log: EventLog) -> None:
    """Write what the run keeps, and let it take its folder.

    An earlier run goes only now, when nothing about the model can be refused any more.
    """
    run, starting = opened.run, opened.run.starting
    record = {"model": opened.source.name, "fingerprint": examples.base, "nybble": __version__}
    write_complete(starting.config, opened.options)
    if base.mixed is not None:
        write_formats(starting.formats, base.mixed)
    write_complete(starting.base_record, json.dumps(record, indent=2) + "\n")
    if opened.template.chat_template is not None:
        write_complete(starting.chat_template, opened.template.chat_template)
    write_complete(starting.audit, json.dumps(examples.data.audit.to_json(), indent=2) + "\n")
    examples.digests.write(starting.data_rows)
    if not opened.config.run.resume:
        run.clear(opened.config.run.overwrite)
    run.move_in(log, 0 if opened.resumed is None else opened.resumed.state["events_bytes"])


def _with_reference(
    opened: _Opened, examples: _Examples, base: _Base, fit: _Fit, causal_lm: CausalLM, report: Listener
) -> _Examples:
    """The rows with what the model that training begins with says of them, where the objective asks it beforehand."""
    if not asks_before(opened.config.objective):
        return examples
    data, evaluations = examples.data, examples.evaluations
    made_of = (examples.base, base.formats, base.rounding and base.rounding.rounding, opened.dtype)
    references = References.open(opened.run.reference, ", ".join(map(str, made_of)), _begins_with(opened))
    ask_reference(
        references,
        causal_lm,
        (Chosen(data.train, _met(opened, examples)), evaluations.rows),
        micro_batch_size=fit.plan.micro_batch_size,
        resumed=opened.resumed is not None,
        seconds_of=partial(forward_seconds, fit.plan.run, fit.plans.machine),
        report=report,
    )
    evaluations = replace(evaluations, rows=references.attached(evaluations.rows))
    return replace(examples, data=data.changed(references.attached), evaluations=evaluations)


def _met(opened: _Opened, examples: _Examples) -> np.ndarray:
    """The training rows that the steps meet."""
    data, rows_per_step = examples.data, opened.config.memory.rows_per_step
    sampler = StepSampler(len(data.train), rows_per_step, opened.config.data.seed, data.mixture)
    met: set[int] = set()
    for _ in range(examples.num_steps):
        met.update(sampler.next_step())
        if len(met) == len(data.train):
            break
    return np.array(sorted(met), dtype=np.int64)


def _begins_with(opened: _Opened) -> str:
    """The adapter that training begins with; empty where that does nothing to the base."""
    adapters = opened.config.adapters
    if adapters.adapter is not None:
        return ADAPTER if opened.continued is None else f"{ADAPTER} {opened.continued.fingerprint()}"
    return "" if adapters.init == "default" else f"init {adapters.init}"


def _take_steps(
    opened: _Opened,
    examples: _Examples,
    base: _Base,
    fit: _Fit,
    causal_lm: CausalLM,
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
        settled=_settled(opened, plan, base.rounding),
        last_step=done,
    )
    report(TrainingBegun(examples.num_steps, done))
    return train_loop(
        causal_lm,
        examples.objective,
        data.train,
        examples.evaluations,
        config.loop,
        optimizer_bits=config.memory.optimizer_bits,
        sampler=StepSampler(len(data.train), config.memory.rows_per_step, config.data.seed, data.mixture),
        total_steps=examples.num_steps,
        micro_batch_size=plan.micro_batch_size,
        run=run,
        adapter_config=adapter_config(causal_lm.module, config.model.model),
        report=report,
        events_bytes=log.sync,
        checkpoints=checkpoints,
        resumed=resumed,
        paged=plan.paged,
        graphs=plan.run.graphs,
        rehearsal=None if config.memory.memory is None else _rehearsal(data, fit.plans, fit.unconstrained),
    )


def _median_step_s(run: RunFolder) -> float:
    """Over all sessions of the run; 0 where no step was taken."""
    steps = sorted(event["step_s"] for event in read_events(run.events, "step"))
    return steps[len(steps) // 2] if steps else 0.0


def _record(opened: _Opened, examples: _Examples) -> None:
    """The tokenizer beside the adapter, and pictures."""
    template, run = opened.template, opened.run
    if template.chat_template is not None:
        template.tokenizer.chat_template = template.chat_template  # a fallback template travels with the adapter
    save_tokenizer(template.tokenizer, run.adapter)
    draw_loss(run.events, run.loss_plot)
    draw_lengths(examples.data.lengths(), opened.config.data.max_seq_len, run.lengths_plot)


def _settled(opened: _Opened, plan: Plan, rounding: RoundingChoice | None) -> dict[str, str | int]:
    """What was chosen for options that choose for themselves: a resumed run computes with the same, to the bit."""
    return {
        "keep": plan.keep,
        "whole_blocks": plan.whole_blocks,
        "micro_batch_size": plan.micro_batch_size,
        "stream_base": "never" if plan.resident_blocks is None else "always",
        "page_optimizer": "always" if plan.paged else "never",
        "offload_activations": "always" if plan.offloaded else "never",
        "threads": torch.get_num_threads(),
        "compute_dtype": {torch.bfloat16: "bf16", torch.float32: "fp32"}[opened.dtype],
        "device": opened.device.type,
    } | ({} if rounding is None else {"quality": rounding.rounding})


def _rehearsal(data: PreparedData, plans: Plans, unconstrained: PlanRequest) -> Rehearsal:
    """The rows of the largest micro-batches that the run will meet."""
    assert plans.chosen is not None
    largest = plans.chosen.batches
    return Rehearsal(
        [data.train[row] for row in largest.heaviest],
        [data.validation[row] for row in largest.heaviest_validation],
        partial(check_peak, plans, unconstrained),
    )


def open_blocks(source: StoredModel, plan: Plan, device: torch.device) -> FolderBlockStore | None:
    """The store of a base that the plan streams, else None."""
    if plan.resident_blocks is None:
        return None
    in_ram = has_own_memory(device) and plan.strategy is Strategy.FROM_RAM  # beside a CPU the file cache has them
    return open_store(source, plan.resident_blocks, device, in_ram=in_ram)


def _place_for_kept(plan: Plan, run: RunFolder, device: torch.device) -> KeptTensors | None:
    """Where blocks keep what their backward passes need; None where that is the memory they compute in."""
    if not plan.offloaded:
        return None
    return activation_place(device, run.path, plan.offloaded_bytes, plan.run.model.num_layers)
