"""A run's plan: what its options ask of the planner, and what it chose, compared with what was measured."""

import shlex
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch

from nybble.errors import ConfigError, PlanError
from nybble.formats.format import DEFAULT_FORMAT, STORED
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.layers.backbone import Reason as NotBlocks
from nybble.layers.backbone import why_not_blocks
from nybble.layers.convert import (
    block_names,
    check_adaptable,
    check_patterns,
    end_modules,
    of_pattern,
    quantizable_linears,
    resolve_targets,
)
from nybble.layers.decoder_block import Keep
from nybble.layers.lora import linear_features
from nybble.layers.quantized_experts import expert_shapes
from nybble.layers.trained import resolve_modules
from nybble.options.adapter_groups import TAKES_FROM_BASE
from nybble.options.groups import MemoryOptions, WeightOptions
from nybble.options.objective_groups import WITH_REFERENCE, WITHOUT_NEXT_TOKENS, ObjectiveOptions
from nybble.options.option import fields_of, flat, with_options, yaml_key
from nybble.options.verbs import PlanConfig, TrainConfig
from nybble.planning.base_costs import mean_bits
from nybble.planning.machine import this_machine
from nybble.planning.machine_table import Machine
from nybble.planning.planner import Plans, make_plans, require
from nybble.planning.run_shape import ADAM_8BIT_BYTES, ADAM_BYTES, MicroBatches, ModelShape, RunShape
from nybble.planning.shape import shape_of, tower_of
from nybble.planning.strategies import Cause, PlanRequest, Reason, Strategy, method_of
from nybble.sizes import rules_for
from nybble.sources.parts import accepting, check_dense_share, partly_dense
from nybble.sources.stored_model import StoredModel
from nybble.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NO_LANE = "copied beside the computing, which nybble does on CPUs and CUDA, not on {kind}"
MICRO_BATCH_TOKENS = 2048  # what one micro-batch aims at when its size is not given
UNCONSTRAINED: Mapping[str, str | None] = {
    "micro_batch_size": None,
    "keep": "auto",
    "whole_blocks": None,
    "page_optimizer": "auto",
    "offload_activations": "auto",
    "stream_base": "auto",
}


def plan_run(
    config: TrainConfig,
    source: StoredModel,
    formats: BaseFormats | None,
    micro_batches: Callable[[int], MicroBatches],
    dtype: torch.dtype,
    device: torch.device,
    folder_to_come: bool = False,
    machine: Machine | None = None,
    new_tokens: int = 0,
) -> tuple[Plans, PlanRequest]:
    """Choose how to train before anything is loaded; what the config says is not chosen.

    Args:
        formats: what the linears of the blocks are quantised to, where the source is not quantised; None where the
            options tell it.
        micro_batches: most rows at once -> what the run's micro-batches come to.
        folder_to_come: the source will be calibrated into a 4-bit folder first.
        machine: as it was before anything was loaded; None where nothing is yet.
        new_tokens: whose rows are trained.

    Returns:
        the plans, and what would be asked if every choice were the planner's.

    Raises:
        PlanError: nothing fits the budget.
        ModelError: most of the model would not be in four bits.
        ConfigError: target_modules names no layer.
    """
    files = () if source.quant_spec is None else source.files
    machine = machine or this_machine(device, dtype, config.memory.memory, model_files=files)
    asked, unconstrained = requests(
        config,
        source.skeleton,
        machine,
        micro_batches=micro_batches,
        dtype=dtype,
        in_folder=folder_to_come or source.is_streamable,
        formats=formats if source.quant_spec is None else source.layer_formats,
        in_four_bits=source.in_four_bits,
        new_tokens=new_tokens,
        heads=source.head_modules,
    )
    if config.method.method == "qlora":
        check_dense_share(asked.run.model.parts, source.name, config.weights.max_dense_share)
    plans = make_plans(asked, machine)
    if config.memory.memory is not None or not machine.on_cpu:  # a processor has more than is free, a GPU has not
        require(plans, asked, unconstrained)
    return plans, unconstrained


def check_peak(plans: Plans, unconstrained: PlanRequest, peak_bytes: int) -> None:
    """Refuse a plan whose rehearsal took more than the budget, and name the nearest that should not.

    Raises:
        PlanError: it did.
    """
    assert plans.chosen is not None
    budget, excess = plans.machine.budget_bytes, peak_bytes - plans.chosen.peak_bytes
    if peak_bytes <= budget:
        return
    nearest = make_plans(unconstrained, replace(plans.machine, budget_bytes=budget - excess)).chosen
    raise PlanError(
        f"The rehearsal of the largest micro-batch took {format_bytes(peak_bytes)}, planned were "
        f"{format_bytes(plans.chosen.peak_bytes)}; the budget is {format_bytes(budget)}.",
        "" if nearest is None else f"What should fit: {nearest.describe()}.",
        f"Raise --memory to {format_bytes(1.05 * peak_bytes)}"
        + ("." if nearest is None else f", or add {nearest.flags()}."),
    )


def requests(
    options: TrainConfig | PlanConfig,
    skeleton: "PreTrainedModel",
    machine: Machine,
    *,
    micro_batches: Callable[[int], MicroBatches],
    dtype: torch.dtype,
    in_folder: bool,
    formats: BaseFormats | None,
    in_four_bits: set[str] | None = None,
    new_tokens: int = 0,
    heads: Collection[str] = (),
) -> tuple[PlanRequest, PlanRequest]:
    """What a run with these options asks of the planner, and the same with every choice left to it.

    Args:
        skeleton: the model on the meta device.
        micro_batches: most rows at once -> what the run's micro-batches come to.
        in_folder: blocks of the base lie in a four-bit folder, or will.
        formats: of a model that is already in four bits, or what was chosen; None where the options tell it.
        in_four_bits: names of the linear layers that a source in four bits has so; None where all will be.
        new_tokens: whose rows of embedding and head are trained.
        heads: modules that make scores of texts, which are trained whole.

    Raises:
        ConfigError: target_modules names no layer.
    """
    adapters, weights, memory = options.adapters, options.weights, options.memory
    _check_lane(memory, machine)
    targets = resolve_targets(skeleton, adapters.target_modules)
    check_patterns(targets, rank_pattern=adapters.rank_pattern)
    check_adaptable(
        skeleton,
        targets,
        dora=adapters.dora,
        dropout=adapters.dropout,
        init=adapters.init,
        probed=adapters.rank == "auto",
    )
    ranks = {name: of_pattern(adapters.rank_pattern, name, adapters.settled_rank) for name in targets}
    few_bits = linears_in_few_bits(options, skeleton, in_four_bits)
    named = resolve_modules(skeleton, adapters.modules_to_save, few_bits, targets)
    whole = list(dict.fromkeys((*named, *heads)))
    against = why_no_blocks(options, skeleton, torch.device(machine.kind), machine.here, in_four_bits)
    model = shape_of(skeleton, in_four_bits)
    trained = [weight.numel() for name in whole for weight in skeleton.get_submodule(name).parameters()]
    experts = {name: shape for name, shape in expert_shapes(skeleton).items() if name in ranks}
    sizes = {name: linear_features(skeleton.get_submodule(name)) for name in targets if name not in experts}
    if adapters.eva_rho > 1:
        ranks = _widest_first(ranks, sizes, adapters.eva_rho)
    parameters = sum(ranks[name] * sum(size) + size[1] * adapters.dora for name, size in sizes.items())
    of_experts = sum(ranks[name] * s.num * (s.in_features + s.out_features) for name, s in experts.items())
    passed = model.passed_experts
    idle = sum(ranks[name] * max(0, s.num - passed) * (s.in_features + s.out_features) for name, s in experts.items())
    if new_tokens:
        parameters += new_tokens * model.hidden_size * (1 if skeleton.all_tied_weights_keys else 2)
    average, most = mean_bits(model, formats) if formats and formats.layers else (options.rounding.mixed, None)
    run = RunShape(
        model,
        batches=micro_batches(1),
        adapter_parameters=parameters + of_experts,
        expert_parameters=of_experts,
        idle_parameters=idle,
        rank=(rank := adapters.settled_rank if len({*ranks.values()}) < 2 else _mean_rank(skeleton, ranks)),
        compute_bytes=dtype.itemsize,
        spec=formats.spec if formats else QuantSpec(_format(weights), weights.block_size, weights.double_quant),
        path="blocks" if against is None else "generic",
        keep="everything",
        rules=rules_for(machine.kind, dtype.itemsize),
        average_bits=average,
        most_bits=most,
        adam_bytes=ADAM_BYTES if memory.optimizer_bits == 32 else ADAM_8BIT_BYTES,
        dropout=adapters.dropout > 0,
        dora=adapters.dora,
        trained_parameters=sum(trained),
        largest_trained=max(trained, default=0),
        scored=skeleton.get_output_embeddings() is None,
        trained_head=any(skeleton.get_submodule(name) is skeleton.get_output_embeddings() for name in whole),
        product_bytes=machine.product_bytes,
        on_cpu=machine.on_cpu,
        asks_reference=options.objective.objective in WITH_REFERENCE,
        more_forwards=more_forwards(options.objective),
        distilled=options.objective.objective == "distill",
        other_ranks=tuple(sorted({*ranks.values()} - {rank})),
        tower=tower_of(skeleton),
    )
    _check_whole_blocks(memory, run, str(against))
    ends = [name for name in end_modules(skeleton) if name in (*targets, *whole) or new_tokens]
    largest_adapter = max(run.largest_trained, *(ranks[name] * max(features) for name, features in sizes.items()), 0)
    of_each = (ranks[name] * s.num * max(s.in_features, s.out_features) for name, s in experts.items())
    largest_adapter = max(largest_adapter, *of_each, 0)

    def request(options: TrainConfig | PlanConfig) -> PlanRequest:
        memory = options.memory
        why = partial(reasons_against, options=options, model=model, in_folder=in_folder, ends=ends, whole=whole)
        against = {strategy: list(why(strategy)) for strategy in Strategy}
        if not machine.has_lane:
            for strategy in (Strategy.PAGED, Strategy.FROM_RAM, Strategy.FROM_DISK):
                against[strategy].insert(0, Reason(Cause.OPTION, NO_LANE.format(kind=machine.kind), "--device cpu"))
        return PlanRequest(
            run,
            batches={size: micro_batches(size) for size in _sizes(memory, run.batches)},
            rows_per_step=memory.rows_per_step,
            keeps=get_args(Keep) if memory.keep == "auto" else (memory.keep,),
            pagings={"auto": (False, True), "never": (False,), "always": (True,)}[memory.page_optimizer],
            offloads=_offloads(memory.offload_activations, run) if machine.has_lane else (False,),
            whole_blocks=memory.whole_blocks,
            adapted=tuple(targets),
            largest_adapter=largest_adapter,
            excluded={strategy: _together(reasons) for strategy, reasons in against.items() if reasons},
        )

    return request(options), request(with_options(options, **UNCONSTRAINED))


def linears_in_few_bits(
    options: TrainConfig | PlanConfig, skeleton: "PreTrainedModel", in_four_bits: Collection[str] | None = None
) -> Collection[str]:
    """Names of the linear layers and projections of experts that are or will be; `in_four_bits` as `requests` takes
    it.
    """
    if options.weights.format == "none":
        return ()
    return [*quantizable_linears(skeleton), *expert_shapes(skeleton)] if in_four_bits is None else in_four_bits


def why_no_blocks(
    options: TrainConfig | PlanConfig,
    skeleton: "PreTrainedModel",
    device: torch.device,
    here: bool = True,
    in_four_bits: Collection[str] | None = None,
) -> NotBlocks | None:
    """None when nybble's decoder blocks will train the model of these options on such a device, else the reason.

    Args:
        here: the device is this machine's.
    """
    adapters, packing = options.adapters, options.memory.packing
    few_bits = linears_in_few_bits(options, skeleton, in_four_bits)
    trained = resolve_modules(skeleton, adapters.modules_to_save, few_bits, ())
    dropout = adapters.dropout > 0
    return why_not_blocks(skeleton, packing=packing, dropout=dropout, trained=trained, device=device, here=here)


def _check_lane(memory: MemoryOptions, machine: Machine) -> None:
    """Refuse what is copied beside the computing where that is not made for the device.

    Raises:
        ConfigError: it was asked for.
    """
    asked = ("page_optimizer", "offload_activations", "stream_base")
    always = [name.replace("_", "-") for name in asked if getattr(memory, name) == "always"]
    if always and not machine.has_lane:
        raise ConfigError(
            f"{always[0]} is always, and device is {machine.kind}.",
            f"It is {NO_LANE.format(kind=machine.kind)}.",
            f"Leave --{always[0]} out, or use --device cpu.",
        )


def _check_whole_blocks(memory: MemoryOptions, run: RunShape, why_not_blocks: str) -> None:
    """Refuse blocks that keep everything where there are not so many, or none that could.

    Args:
        why_not_blocks: why decoder blocks do not compute the model, where they do not.

    Raises:
        ConfigError: so it is.
    """
    wanted, most = memory.whole_blocks or 0, run.model.num_layers
    if wanted > most:
        allowed = f"Allowed: 0 to {most}, as many as the model has blocks."
        raise ConfigError(f"whole-blocks is {wanted}.", allowed, "Lower --whole-blocks, or leave it out.")
    if wanted and run.path != "blocks":
        raise ConfigError(
            f"whole-blocks is {wanted}, and the model's own modules compute it: {why_not_blocks}.",
            "Blocks that keep more than others are nybble's decoder blocks.",
            "Leave --whole-blocks out.",
        )


def more_forwards(objective: ObjectiveOptions) -> int:
    """Passes without a gradient that each micro-batch takes: of the reference in the step, KTO's own over the
    mismatched answers, and that in which texts are first embedded.
    """
    in_step = objective.reference == "step"
    match objective.objective:
        case "dpo" | "ipo":
            return 1 if in_step else 0
        case "kto":
            return 3 if in_step else 1
        case "embed":
            return 1
        case _:
            return 0


def _mean_rank(skeleton: "PreTrainedModel", ranks: Mapping[str, int]) -> int:
    """Of the layers of the block that has most, rounded up."""
    blocks = [[rank for name, rank in ranks.items() if name.startswith(f"{block}.")] for block in block_names(skeleton)]
    return max((-(-sum(block) // len(block)) for block in blocks if block), default=max(ranks.values()))


def _widest_first(ranks: Mapping[str, int], sizes: Mapping[str, tuple[int, int]], rho: float) -> dict[str, int]:
    """The ranks that take most of all that --eva-rho may give out: as many as there are, the widest layers first."""
    left, given = sum(ranks.values()), dict.fromkeys(ranks, 0)
    for name in sorted(ranks, key=lambda name: -sum(sizes[name])):
        given[name] = min(left, round(rho * ranks[name]))
        left -= given[name]
    return given


def _sizes(memory: MemoryOptions, one_row: MicroBatches) -> list[int]:
    """Rows at once to choose among.

    Args:
        one_row: micro-batches of a row each.
    """
    if memory.micro_batch_size:
        return [memory.micro_batch_size]
    sizes = [max(1, min(memory.rows_per_step, MICRO_BATCH_TOKENS // (one_row.longest_row * one_row.documents)))]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes


def _offloads(wanted: str, run: RunShape) -> tuple[bool, ...]:
    if wanted == "never" or (run.on_cpu and run.path != "blocks"):
        return (False,)
    return (True,) if wanted == "always" else (False, True)


def reasons_against(
    strategy: Strategy,
    options: TrainConfig | PlanConfig,
    model: ModelShape,
    in_folder: bool,
    ends: list[str],
    whole: Collection[str],
) -> Iterator[Reason]:
    """Why these options do not allow a strategy; nothing where they do.

    Args:
        in_folder: blocks of the base lie in a four-bit folder, or will.
        ends: embedding and head, where something of them is trained.
        whole: names of the modules that are trained whole.
    """
    weights, memory = options.weights, options.memory
    method, objective = options.method.method, options.objective.objective
    if method_of(strategy) == "full" and objective in WITHOUT_NEXT_TOKENS:
        yield Reason(Cause.OPTION, f"--objective {objective} trains adapters")
    if method_of(strategy) != method and method != "auto":
        said = "not asked for" if method == "qlora" or not strategy.four_bit else f"--method {method} keeps 16 bits"
        yield Reason(Cause.OPTION, said, f"--method {method_of(strategy)}")
    if strategy.four_bit and model.parts.dense_share > weights.max_dense_share:
        yield Reason(Cause.MOSTLY_DENSE, partly_dense(model.parts), accepting(model.parts))
    page = memory.page_optimizer
    if (strategy, page) in ((Strategy.PAGED, "never"), (Strategy.FOUR_BIT, "always")):
        yield Reason(Cause.OPTION, f"--page-optimizer {page}", "--page-optimizer auto")
    if strategy in (Strategy.FOUR_BIT, Strategy.PAGED) and memory.stream_base == "always":
        yield Reason(Cause.OPTION, "--stream-base always", "--stream-base auto")
    if strategy.streamed:
        yield from why_not_streamed(options, in_folder, ends, whole)


def why_not_streamed(
    options: TrainConfig | PlanConfig, in_folder: bool, ends: list[str], whole: Collection[str]
) -> Iterator[Reason]:
    """Why blocks of the base cannot be read where they are used; nothing where they can. Arguments as
    `reasons_against` takes them.
    """
    if options.adapters.init not in ("default", *TAKES_FROM_BASE):
        yield Reason(Cause.OPTION, f"--init {options.adapters.init} needs the whole base", "--init default")
    if options.adapters.dora:
        yield Reason(Cause.OPTION, "--dora needs the rows of the whole base", "--no-dora")
    if ends:
        named = "--target-modules" if ends[0] not in whole else "--modules-to-save"
        what = "the adapter on" if ends[0] not in whole else "training"
        yield Reason(Cause.OPTION, f"{what} {ends[0]} needs it in memory", f"{named} without it")
    elif not in_folder:
        command, folder = quantize_command(options)
        way = f"{command}, then --model {shlex.quote(folder)}"
        yield Reason(Cause.NEEDS_FOLDER, "read from a 4-bit folder only", way)
    if options.memory.stream_base == "never":
        yield Reason(Cause.OPTION, "--stream-base never", "--stream-base auto")


def _together(reasons: list[Reason]) -> Reason:
    """The first, and what takes away all of them."""
    ways = [reason.way for reason in reasons]
    return replace(reasons[0], way=", and ".join(ways) if all(ways) else "")


# options of a run that `nybble quantize` has too and that decide what its folder is
QUANTIZE_FLAGS = ("tokenizer", "format", "block_size", "double_quant", "mixed", "max_dense_share")


def quantize_command(options: TrainConfig | PlanConfig) -> tuple[str, str]:
    """The command that makes a four-bit folder as these options want one, and the folder's name."""
    model, values, fields = options.model.model, flat(options), fields_of(type(options))
    folder = f"{Path(model).expanduser().absolute().name.removesuffix('.gguf')}-{_format(options.weights)}"
    words = ["nybble", "quantize", "--model", model, "--out", folder]
    for name in QUANTIZE_FLAGS:
        value = values[name]
        if value not in (fields[name].default, "none", STORED):
            flag = f"--{'no-' if value is False else ''}{yaml_key(name)}"
            words += [flag] if isinstance(value, bool) else [flag, str(value)]
    return shlex.join(words), folder


def _format(weights: WeightOptions) -> str:
    """What a base is put into, were it not left in 16 bits."""
    return DEFAULT_FORMAT if weights.format in ("none", STORED) else weights.format
