"""A training run from its config to its folder: open, audit, load, predict, train, record."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from nybble import openmp
from nybble.data.calibration_text import CalibrationText
from nybble.data.plots import draw_lengths
from nybble.data.prepare import PreparedData, field_names, prepare_data
from nybble.data.sampler import StepSampler
from nybble.data.show import render_audit
from nybble.data.template import ChatTemplate, open_template
from nybble.errors import PlanError, RunError
from nybble.files.disk import disk_errors, write_complete
from nybble.formats.quant_spec import BaseFormats
from nybble.kernels.heap import give_back_free
from nybble.layers.backbone import KeptTensors
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import attach_adapters, describe_untouched, quantizable_linears, resolve_targets
from nybble.layers.precision import resolve_compute_dtype, resolve_device
from nybble.memory.measure import PeakMemory, used_bytes
from nybble.memory.offload import ActivationFile, PinnedActivations
from nybble.memory.store import FolderBlockStore, open_store
from nybble.options.option import config_to_yaml
from nybble.options.verbs import TrainConfig
from nybble.planning.micro_batches import dealer, total_steps
from nybble.planning.planner import FROM_RAM, Ask, Plan, Plans
from nybble.planning.report import show_measured, show_plans
from nybble.planning.request import check_peak, plan_run
from nybble.quantization.adapter_init import STATISTICS_BYTES, check_initialisable, initialise_adapters
from nybble.quantization.mixed import MixedFormats, measure_mixed, some_windows
from nybble.quantization.walk import WalkError
from nybble.runs.adapter_files import adapter_config, restore_adapter
from nybble.runs.base import (
    QualityChoice,
    adopt_base,
    base_formats,
    check_calibration_fits,
    choose_quality,
    kept_base,
    load_base,
    make_calibrated_base,
    quant_spec,
    run_calibration_text,
    without_calibration,
)
from nybble.runs.context import note_context, within_context
from nybble.runs.continued import check_base_of, open_adapter, take_options
from nybble.runs.events import EventLog, read_events, rewind_events
from nybble.runs.folder import RunFolder
from nybble.runs.formats import show_mixed, write_formats
from nybble.runs.plan_file import write_plan
from nybble.sources.embedding import embedding_rows
from nybble.sources.folder import FolderSource
from nybble.sources.interface import ModelSource
from nybble.sources.open import open_source
from nybble.sources.skeleton import build_skeleton
from nybble.sources.tokenizer import save_tokenizer
from nybble.training.checkpoint import Checkpoints, newest_checkpoint
from nybble.training.display import Display
from nybble.training.evaluations import plan_evaluations
from nybble.training.loop import LoopResult, Rehearsal, train_loop
from nybble.training.objective import SupervisedFineTuning
from nybble.training.plots import draw_loss
from nybble.training.resume import DataDigests, check_base, check_data, settle_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


INIT_TOKENS = 8192  # of the text that --init activation takes the layers' inputs from


@dataclass(frozen=True)
class TrainedRun:
    """A run that ended, with everything still in memory for showing what changed."""

    config: TrainConfig
    run: RunFolder
    source: ModelSource
    model: "PreTrainedModel"
    template: ChatTemplate
    data: PreparedData
    result: LoopResult
    streamed: bool


def train(config: TrainConfig, console: Console) -> TrainedRun:
    """Run `config` to its end or to the user's Ctrl-C; the adapter then lies in `<out>/adapter`.

    Raises:
        NybbleError: anything the user can mend; an earlier run's folder is untouched unless training began.
    """
    run = RunFolder(config.out)
    refused = (
        "A run needs files that can be read and a folder that can be written.",
        f"Mend what is wrong; a run that had begun goes on with: nybble train --resume --out {run.path}",
    )
    with run.locked(), disk_errors(run.path, RunError, *refused, what="cannot be read or written"):
        return _train(config, run, console)


def _train(config: TrainConfig, run: RunFolder, console: Console) -> TrainedRun:
    given, resumed = config, None
    if config.resume:
        run.check_resumable()
        resumed = newest_checkpoint(
            run.checkpoints, partial(console.print, style="yellow", markup=False, highlight=False)
        )
        config = config if resumed is None else settle_config(resumed, config)
    else:
        run.check_free(config.overwrite)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    dtype = resolve_compute_dtype(config.compute_dtype, device)

    source = open_source(config.model, config.tokenizer)
    config = within_context(config, source.config)
    if config.init != "default":
        check_initialisable(source, config.format != "none")
    started_from = None
    if config.adapter is not None and resumed is None:
        started_from = open_adapter(config.adapter)
        config = take_options(config, started_from, build_skeleton(source.config, dtype))
        given = config
        for note in check_base_of(started_from, source, config.allow_change):
            console.print(note, style="yellow", markup=False, highlight=False)
    same = resumed is not None and "config" not in config.allow_change
    template = open_template(config, source.load_tokenizer(), run.chat_template if same else None)
    objective, vocab_size = SupervisedFineTuning(), source.config.get_text_config().vocab_size
    data = prepare_data(config, template, vocab_size, partial(embedding_rows, source), objective.encode)
    data = note_context(data, config, source.config)
    show_found(console, source, data)
    data.audit.check()
    base, digests = source.fingerprint(), DataDigests.of(data)
    if resumed is not None:
        check_base(resumed, base, config.allow_change)
        check_data(resumed, data, digests, config.allow_change)

    sampler = StepSampler(len(data.train), config.rows_per_step, config.seed)
    num_steps = total_steps(config, len(data.train), config.rows_per_step)
    begun_with = None if resumed is None else resumed.about.get("evaluated_rows")
    evaluations = plan_evaluations(config, data.train, data.validation, num_steps, begun_with)
    if evaluations.note:
        console.print(evaluations.note, highlight=False)
    choice = choose_quality(config, source, data, num_steps, dtype, device)
    show_quality(console, choice)
    plan_it = partial(plan_run, config, deal=dealer(config, data), dtype=dtype, device=device)
    calibrated = choice is not None and choice.quality == "calibrated"
    if config.memory is not None and (calibrated or config.mixed is not None) and not config.resume:
        # What never fits is refused before minutes are spent on its bits.
        plan_it(source, build_skeleton(source.config, dtype), None, folder_to_come=calibrated)
    if calibrated and not config.resume:
        check_calibration_fits(config, source, dtype, device)
    text = partial(
        run_calibration_text, config, source, data.train, data.validation, template, field_names(config), config.seed
    )
    mixed = None if config.mixed is None or config.resume else _measure_mixed(config, source, text, dtype, device)
    if mixed is not None:
        show_mixed(console, mixed)
    formats = base_formats(config, run) if mixed is None else mixed.formats
    base_source, choice = _base_source(config, run, source, formats, text, choice, dtype, console)

    with PeakMemory(device) as memory:
        skeleton = build_skeleton(base_source.config, dtype)
        plans, freed = plan_it(base_source, skeleton, formats)
        plan = plans.chosen or plans.smallest  # without --memory the smallest is tried in any case
        show_plans(console, plans, freed)
        store = open_blocks(base_source, skeleton, plan, device)
        del skeleton
        model = load_base(config, base_source, formats, dtype, device, console, store, stream_ends=plan.stream_ends)
        attach_adapters(
            model,
            resolve_targets(model, _target_names(config)),
            rank=config.rank,
            alpha=config.alpha,
            dropout=config.dropout,
            rslora=config.rslora,
            seed=config.seed,
        )
        if config.init != "default" and resumed is None:
            windows = some_windows(text().windows, INIT_TOKENS) if config.init == "activation" else None
            free = (plan.peak_bytes - used_bytes(device)) // 2  # of what training will take; half for the windows' pass
            initialise_adapters(model, source, windows, min(free, STATISTICS_BYTES))
        if started_from is not None:
            restore_adapter(model, started_from.folder)
        kept = _place_for_kept(plan, run, device)
        causal_lm = CausalLM.of(model, keep=plan.keep, packing=config.packing, store=store, kept=kept)
        if causal_lm.packed != config.packing:
            plans, freed = _plan_padded(config, base_source, formats, data, plans, plan, dtype, device)
            again = plans.chosen or plans.smallest
            console.print(f"planned again, for padded rows: {again.describe()}", highlight=False)
            if again.keep != plan.keep:
                causal_lm = CausalLM.of(model, keep=again.keep, packing=config.packing, store=store, kept=kept)
            plan = again
        if not config.resume:  # an earlier run goes only now, when nothing about the model can be refused any more
            run.create(config.overwrite)
            adopt_base(run)
        console.print(f"computing through: {causal_lm.name}", highlight=False)
        for note in describe_untouched(model):
            console.print(note, highlight=False)
        if openmp.waiting == "unknown" and device.type == "cpu":
            console.print(f"threads wait {openmp.SENTENCES['unknown']}", style="yellow", highlight=False)
        give_back_free()  # what loading took and freed
        options = config_to_yaml(given.model_copy(update={"resume": False, "allow_change": ()}))
        write_complete(run.config, options)  # first: from here on there is a run to go on with
        if mixed is not None:
            write_formats(run.formats, mixed)
        write_complete(run.base_record, json.dumps({"model": source.name, "fingerprint": base}, indent=2) + "\n")
        if template.chat_template is not None:
            write_complete(run.chat_template, template.chat_template)
        write_complete(run.audit, json.dumps(data.audit.to_json(), indent=2) + "\n")
        digests.write(run.data_rows)
        rewind_events(run.events, 0 if resumed is None else resumed.state["events_bytes"])
        events = EventLog(run.events)
        if started_from is not None:
            events.write("adapter", path=str(started_from.folder), sha256=started_from.fingerprint())
        if resumed is not None:
            events.write("resume", step=resumed.step)
            console.print(f"going on after step {resumed.step} of {num_steps}", highlight=False)
        checkpoints = Checkpoints(
            run.checkpoints,
            save_every=config.save_every,
            keep=config.keep_checkpoints,
            config=options,
            about={"base": base, "data": digests.fingerprint, "evaluated_rows": len(evaluations.rows)},
            settled=_settled(config, plan, choice, dtype, device),
            last_step=None if resumed is None else resumed.step,
        )
        started = time.perf_counter()
        with Display(console, num_steps) as display:
            result = train_loop(
                causal_lm,
                objective,
                data.train,
                evaluations,
                config,
                sampler=sampler,
                total_steps=num_steps,
                micro_batch_size=plan.micro_batch_size,
                run=run,
                adapter_config=adapter_config(model, config.model, alpha=config.alpha, rslora=config.rslora),
                events=events,
                display=display,
                checkpoints=checkpoints,
                resumed=resumed,
                paged=plan.paged,
                rehearsal=None if config.memory is None else _rehearsal(data, plans, freed),
            )
        training_s = time.perf_counter() - started
    events.write(
        "end", steps=result.steps, interrupted=result.interrupted is not None, peak_memory_bytes=memory.peak_bytes
    )
    events.close()
    _save_tokenizer(template, run)
    steps = sorted(event["step_s"] for event in read_events(run.events, "step"))
    step_s = steps[len(steps) // 2] if steps else 0.0
    measured = {"peak_bytes": memory.peak_bytes, "start_bytes": memory.start_bytes, "step_s": step_s}
    write_plan(run.plan, plans, causal_lm.name, choice, measured)
    draw_loss(run.events, run.loss_plot)
    draw_lengths(data.lengths(), config.max_seq_len, run.lengths_plot)
    console.print(f"{result.steps} steps in {training_s:.0f} s", highlight=False)
    show_measured(console, plan, memory, step_s)
    return TrainedRun(config, run, source, model, template, data, result, store is not None)


def _plan_padded(
    config: TrainConfig,
    source: ModelSource,
    formats: BaseFormats | None,
    data: PreparedData,
    packed: Plans,
    loaded: Plan,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Plans, Ask]:
    """Plans for rows that turned out not to go side by side; how the base was loaded stays.

    Raises:
        PlanError: they would need it loaded otherwise, or nothing fits.
    """
    stream = "never" if loaded.resident_blocks is None else "always"
    padded = config.model_copy(update={"packing": False, "stream_base": stream})
    plans, freed = plan_run(
        padded,
        source,
        build_skeleton(source.config, dtype),
        formats,
        dealer(padded, data),
        dtype,
        device,
        machine=packed.machine,
    )
    plan = plans.chosen or plans.smallest
    if (plan.resident_blocks, plan.offloaded) != (loaded.resident_blocks, loaded.offloaded):
        raise PlanError(
            "The plan is for rows side by side, which this model mixes, and padded rows need another.",
            f"What fits padded: {plan.describe()}.",
            "Plan for them from the beginning: add --no-packing.",
        )
    return plans, freed


def _rehearsal(data: PreparedData, plans: Plans, freed: Ask) -> Rehearsal:
    """The rows of the largest micro-batches that the run will meet."""
    assert plans.chosen is not None
    largest = plans.chosen.batches
    return Rehearsal(
        [data.train[row] for row in largest.heaviest],
        [data.validation[row] for row in largest.heaviest_held_out],
        partial(check_peak, plans, freed),
    )


def _base_source(
    config: TrainConfig,
    run: RunFolder,
    source: ModelSource,
    formats: BaseFormats | None,
    text: Callable[[], CalibrationText],
    choice: QualityChoice | None,
    dtype: torch.dtype,
    console: Console,
) -> tuple[ModelSource, QualityChoice | None]:
    """What the frozen base is loaded from: the source, or the calibrated folder made from it; and how it came to be."""
    if choice is None or choice.quality != "calibrated":
        return source, choice
    kept = kept_base(run) if config.resume else None
    if kept is not None:
        return kept, choice
    assert formats is not None
    try:
        base = make_calibrated_base(run, source, formats, text(), dtype, console, config.max_dense_share)
        return base, choice
    except WalkError as error:
        instead = without_calibration(choice, error)
        show_quality(console, instead)
        return source, instead


def show_quality(console: Console, choice: QualityChoice | None) -> None:
    """How the weights are put into four bits, where they are."""
    if choice is not None:
        console.print(f"quality of the four bits: {choice.quality} ({choice.why})", highlight=False)


def _measure_mixed(
    config: TrainConfig,
    source: ModelSource,
    text: Callable[[], CalibrationText],
    dtype: torch.dtype,
    device: torch.device,
) -> MixedFormats:
    """The formats of the base's layers, by what the model's answers on the calibration text would suffer."""
    spec = quant_spec(config)
    assert spec is not None and config.mixed is not None
    return measure_mixed(source, config.mixed, spec, text().windows, dtype, device)


def _save_tokenizer(template: ChatTemplate, run: RunFolder) -> None:
    if template.chat_template is not None:
        template.tokenizer.chat_template = template.chat_template  # a fallback template travels with the adapter
    save_tokenizer(template.tokenizer, run.adapter)


def _settled(
    config: TrainConfig, plan: Plan, choice: QualityChoice | None, dtype: torch.dtype, device: torch.device
) -> dict[str, str | int]:
    """What was chosen for options that choose for themselves: a resumed run computes with the same, to the bit."""
    return {
        "keep": plan.keep,
        "micro_batch_size": plan.micro_batch_size,
        "stream_base": "never" if plan.resident_blocks is None else "always",
        "page_optimizer": "always" if plan.paged else "never",
        "offload_activations": "always" if plan.offloaded else "never",
        "threads": torch.get_num_threads(),
        "compute_dtype": {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype],
        "device": device.type,
    } | ({} if choice is None else {"quality": choice.quality})


def open_blocks(
    source: ModelSource, skeleton: "PreTrainedModel", plan: Plan, device: torch.device
) -> FolderBlockStore | None:
    """The store of a base that the plan streams, else None."""
    if plan.resident_blocks is None:
        return None
    assert isinstance(source, FolderSource), source
    in_ram = device.type == "cuda" and plan.strategy == FROM_RAM  # beside a CPU the file cache has them
    return open_store(source, quantizable_linears(skeleton), plan.resident_blocks, device, in_ram=in_ram)


def _place_for_kept(plan: Plan, run: RunFolder, device: torch.device) -> KeptTensors | None:
    """Where blocks keep what their backward passes need; None where that is the memory they compute in."""
    if not plan.offloaded:
        return None
    if device.type == "cuda":
        return PinnedActivations()
    existing = next(folder for folder in (run.path, *run.path.parents) if folder.is_dir())  # the run's own comes later
    return ActivationFile(existing, plan.offloaded_bytes)


def show_found(console: Console, source: ModelSource, data: PreparedData) -> None:
    """What the run starts from: the model, then the audit of the data."""
    console.print(f"model: {source.name}", highlight=False)
    for note in source.notes:
        console.print(f"  {note}", highlight=False)
    console.print(render_audit(data.audit))


def _target_names(config: TrainConfig) -> str | list[str]:
    return config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
