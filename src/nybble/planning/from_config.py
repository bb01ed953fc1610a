"""`nybble plan`: a run's plan from the model's config.json alone, for this machine or one that is not here."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nybble.data.open_template import open_template
from nybble.data.picture_reader import have_pictures
from nybble.data.prepare import PreparedData, prepare_data
from nybble.data.row_kinds import row_kind
from nybble.errors import ModelError, foreign_errors
from nybble.events import Listener, Note, silent
from nybble.formats.bnb import formats_from_config, true_config
from nybble.formats.format import STORED
from nybble.layers.context import widest_rows, within_positions
from nybble.layers.convert import parameters_a_rank
from nybble.layers.picture_model import own_size, picture_tokens
from nybble.layers.precision import resolve_compute_dtype, resolve_device
from nybble.options.groups import DataOptions, PlannedMachine
from nybble.options.option import with_options
from nybble.options.seq2seq import for_seq2seq
from nybble.options.verbs import PlanConfig, as_method, methods_left, settle_method
from nybble.planning.asked import TOP_K, AskedModel, Asking, plan_asking
from nybble.planning.machine import this_machine_later
from nybble.planning.machine_table import Machine, named_machine
from nybble.planning.micro_batches import even_micro_batches, micro_batches_of, total_steps
from nybble.planning.planner import Plans, first_that_fits, make_plans
from nybble.planning.ranks import MOST_RANK, RankChosen, enough_rank, tokens_met
from nybble.planning.request import requests, why_no_blocks
from nybble.planning.run_shape import MicroBatches
from nybble.planning.strategies import PlanRequest
from nybble.sizes import rules_for
from nybble.sources.hub import fetch_config, looks_like_hub_id
from nybble.sources.open import check_revision, open_model
from nybble.sources.shapes import SHAPES
from nybble.sources.skeleton import (
    build_skeleton,
    build_whole,
    config_from_json,
    config_refused,
    is_encoder,
    reads_whole,
    stored_text_config,
    untie,
)
from nybble.sources.task import HEADS, PICTURED, TOKENS, reads_pictures, task_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

QUANTIZATION = "quantization_config"  # which the tensors' own names and sizes say


class PlannedRun(NamedTuple):
    """The plans for some options.

    Args:
        unconstrained: what was `asked`, with every choice left to the planner.
        teacher: what asking it takes before the run; None where there is none.
    """

    plans: Plans
    asked: PlanRequest
    unconstrained: PlanRequest
    teacher: Asking | None


def plan_from_config(options: PlanConfig, report: Listener = silent) -> PlannedRun:
    """Plan what these options say.

    Raises:
        ModelError: the config cannot be found, or transformers cannot build its model.
    """
    options = settle_method(options)
    written = read_config(options.model.model, report, options.model.revision)
    machine, dtype = _machine(options.machine, options.memory.memory)
    config = transformers_config(written)
    task = task_of(options.objective.objective, config)
    if task is TOKENS and is_encoder(config):
        raise ModelError(
            f"{options.model.model} is an encoder, which goes on with no text.",
            "Allowed with it: --objective classify, which tells texts apart, and embed.",
            "Add --objective, or name a decoder.",
        )
    skeleton = build_skeleton(task.config(config), task=task)
    if task.prompted and written.get("tie_word_embeddings") is False and skeleton.all_tied_weights_keys:
        untie(skeleton, ["lm_head.weight"])  # T5's config does not let on
    if reads_whole(config) and task is not TOKENS:
        options = with_options(options, packing=False)
    if task.prompted:
        options = for_seq2seq(options)
    length = within_positions(options.data.max_seq_len, config, lambda: skeleton)
    options = with_options(options, max_seq_len=length)
    prepared = None if options.data.data is None else _read_examples(options, skeleton)
    if prepared is not None and have_pictures(prepared.train + prepared.validation):
        source = open_model(options.model.model, options.model.tokenizer, revision=options.model.revision)
        skeleton = source.for_task(replace(PICTURED, towers=options.weights.quantize_towers)).skeleton
    options = _with_rank(options, skeleton, prepared, report)
    formats, in_four_bits = formats_from_config(written), None
    in_folder = formats is not None or options.model.model in SHAPES
    if options.weights.format == STORED:
        source = open_model(options.model.model, None, report, options.model.revision).as_stored()
        formats, in_four_bits, in_folder = source.layer_formats, source.in_four_bits, source.is_streamable
    micro_batches = _micro_batches(options, skeleton, machine, dtype, prepared, report)
    teacher = None
    if options.objective.teacher is not None:
        teacher = _asking(options, options.objective.teacher, machine, micro_batches, prepared, dtype, report)
    ask = partial(
        requests,
        skeleton=skeleton,
        machine=machine,
        micro_batches=micro_batches,
        dtype=dtype,
        in_folder=in_folder,
        formats=formats,
        in_four_bits=in_four_bits,
        heads=[name for name, _ in skeleton.named_children() if name in HEADS],
    )
    asked, unconstrained = ask(options)
    plans = make_plans(asked, machine)
    if options.method.method == "auto":
        left = [method for method in methods_left(options) if method == "qlora" or formats is None]
        method, why = first_that_fits(plans, left, options.memory.memory)
        report(Note(f"method: {method}: {why}"))
        asked, unconstrained = ask(as_method(options, method))
        plans = make_plans(asked, machine)
    return PlannedRun(plans, asked, unconstrained, teacher)


def _asking(
    options: PlanConfig,
    name: str,
    machine: Machine,
    micro_batches: Callable[[int], MicroBatches],
    prepared: PreparedData | None,
    dtype: torch.dtype,
    report: Listener,
) -> Asking:
    """What asking a teacher takes: about the rows of --data, or about those of --max-steps steps, or of one."""
    written = read_config(name, report)
    formats = formats_from_config(written)
    skeleton = build_skeleton(transformers_config(written))
    model = AskedModel(name, skeleton, formats, None, formats is not None)
    format = options.objective.teacher_format or "auto"
    plan = plan_asking(model, format, micro_batches, machine, dtype, packing=options.memory.packing)
    rows = (options.loop.max_steps or 1) * options.memory.rows_per_step
    tokens = targets = rows * options.data.max_seq_len
    if prepared is not None:
        rows = min(total_steps(options.loop, len(prepared.train), 1), len(prepared.train)) + len(prepared.validation)
        share = rows / (len(prepared.train) + len(prepared.validation))
        both = prepared.train + prepared.validation
        tokens, targets = round(share * int(both.lengths.sum())), round(share * int(both.supervised_tokens.sum()))
    return Asking.of(name, plan, machine, rows, tokens, targets, options.objective.teacher_top_k or TOP_K)


def read_config(model: str, report: Listener = silent, revision: str | None = None) -> dict[str, Any]:
    """A model's config.json as it is written, without its weights.

    Args:
        model: one of SHAPES, a folder, a hub id, a .gguf file or an alias.
        revision: of a model on the hub.

    Raises:
        ModelError: there is none, or it is not JSON.
    """
    check_revision(model, revision, SHAPES)
    if model in SHAPES:
        return SHAPES[model]
    path = Path(model).expanduser()
    if not path.is_dir() and (path.is_file() or not looks_like_hub_id(model) or "/" not in model):
        config: dict[str, Any] = open_model(model, report=report).config.to_dict()
    else:
        file = path / "config.json" if path.is_dir() else fetch_config(model, revision)
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} is not readable JSON: {error}.", fix="Check the path.") from error
        if not isinstance(config, dict):
            raise ModelError(f"{file} holds no object.", "Allowed: a config.json written by transformers.")
    return true_config(config)


def transformers_config(written: dict[str, Any]) -> "PretrainedConfig":
    """What transformers makes of a config.json: of the text part, where there are others.

    Raises:
        ModelError: it does not know the architecture, or cannot take a value.
    """
    from transformers import CONFIG_MAPPING

    if not isinstance(written.get("model_type"), str):
        raise ModelError("The model's config has no model_type.", "Allowed: a config.json written by transformers.")
    refused = config_refused(f"this config ({written['model_type']!r})")
    if written["model_type"] not in CONFIG_MAPPING:
        raise refused(ValueError("it has no such model type"))
    with foreign_errors(refused):
        config = config_from_json({name: value for name, value in written.items() if name != QUANTIZATION})
    return stored_text_config(config, written, build_whole(config))


def _machine(options: PlannedMachine, memory: int | None) -> tuple[Machine, torch.dtype]:
    """The machine, and what a run there computes in."""
    if options.machine is not None:
        dtype = torch.float32 if options.compute_dtype == "fp32" else torch.bfloat16
        return named_machine(options.machine, memory, options.host_memory), dtype
    device = resolve_device(options.device)
    dtype = resolve_compute_dtype(options.compute_dtype, device)
    return this_machine_later(device, dtype, memory, options.host_memory), dtype


def _read_examples(options: PlanConfig, skeleton: "PreTrainedModel") -> PreparedData:
    source = open_model(options.model.model, options.model.tokenizer, revision=options.model.revision)
    objective = options.objective.objective
    kind = row_kind(objective, prompted=task_of(objective, source.config).prompted)
    template = open_template(options.data, source.load_tokenizer(), kind=kind, reader=source.picture_reader)
    vocab_size = getattr(skeleton.config.get_text_config(), "vocab_size", None)
    return prepare_data(DataOptions(**options.data.model_dump()), template, vocab_size, kind=kind)


def _with_rank(
    options: PlanConfig, skeleton: "PreTrainedModel", prepared: PreparedData | None, report: Listener
) -> PlanConfig:
    """With the most that --rank auto takes in place of it."""
    if options.adapters.rank != "auto":
        return options
    chosen = RankChosen(MOST_RANK, "the most that --rank auto takes: without --data nothing is known of the tokens")
    if prepared is not None:
        steps = total_steps(options.loop, len(prepared.train), options.memory.rows_per_step)
        tokens = tokens_met(prepared.train, steps * options.memory.rows_per_step)
        chosen = enough_rank(tokens, parameters_a_rank(skeleton, options.adapters))
    report(chosen)
    return with_options(options, rank=chosen.rank)


def _micro_batches(
    options: PlanConfig,
    skeleton: "PreTrainedModel",
    machine: Machine,
    dtype: torch.dtype,
    prepared: PreparedData | None,
    report: Listener,
) -> Callable[[int], MicroBatches]:
    """Most rows at once -> what micro-batches of so many come to."""
    data, memory, rules = (
        options.data,
        options.memory,
        rules_for(machine.kind, dtype.itemsize, widest_rows(skeleton, skeleton.config)),
    )
    task = task_of(options.objective.objective, skeleton.config)
    if prepared is None:
        length, rows, packed = data.max_seq_len, memory.rows_per_step, memory.packing
        if reads_pictures(skeleton.config):
            length = picture_tokens(skeleton, *own_size(skeleton))
        kind = row_kind(options.objective.objective, prompted=task.prompted)
        learnt = length if task.prompted else None if task.writes else kind.documents
        even = partial(even_micro_batches, rows_per_step=rows, packed=packed, rules=rules, apart=task.prompted)
        return lambda size: even(length, size=size, documents=kind.documents, learnt=learnt)
    steps = total_steps(options.loop, len(prepared.train), memory.rows_per_step)
    if prepared.mixture is not None:
        report(Note(prepared.mixture.describe(steps * memory.rows_per_step)))
    against = why_no_blocks(options, skeleton, torch.device(machine.kind), machine.here)
    return micro_batches_of(
        prepared, memory, rules, steps=steps, seed=data.seed, shares=against is None, apart=task.prompted
    )
