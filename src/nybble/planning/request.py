"""A run's plan: what is asked of the planner, what it chose, shown before and compared with what was measured."""

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch

from nybble.errors import PlanError
from nybble.formats.format import DEFAULT_FORMAT
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.layers.backbone import why_not_config
from nybble.layers.convert import end_modules, quantizable_linears, resolve_targets
from nybble.layers.decoder_block import Keep
from nybble.layers.lora import linear_features
from nybble.layers.loss_head import CHUNK_BYTES, PANEL_BYTES
from nybble.options.option import yaml_key
from nybble.options.verbs import PlanConfig, TrainConfig
from nybble.planning import planner
from nybble.planning.costs import ADAM_8BIT_BYTES, ADAM_BYTES, MicroBatches, ModelShape, mean_bits
from nybble.planning.machine import Machine, this_machine
from nybble.planning.planner import Ask, Cause, Plans, Reason, make_plans
from nybble.sources.folder import FolderSource
from nybble.sources.interface import ModelSource
from nybble.sources.inventory import accepting, check_dense_share, partly_dense
from nybble.sources.placement import place_tensors
from nybble.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MICRO_BATCH_TOKENS = 2048  # what one micro-batch aims at when its size is not given
STREAMED = (planner.FROM_RAM, planner.FROM_DISK)
FOUR_BIT = (planner.FOUR, planner.PAGED, *STREAMED)


def plan_run(
    config: TrainConfig,
    source: ModelSource,
    skeleton: "PreTrainedModel",
    formats: BaseFormats | None,
    deal: Callable[[int], MicroBatches],
    dtype: torch.dtype,
    device: torch.device,
    folder_to_come: bool = False,
    machine: Machine | None = None,
) -> tuple[Plans, Ask]:
    """Choose how to train before anything is loaded; what the config says is not chosen.

    Args:
        skeleton: the model on the meta device.
        formats: what the linears of the blocks are quantised to, where the source is not quantised; None where the
            options tell it.
        deal: most rows at once -> what the run's micro-batches come to.
        folder_to_come: the source will be calibrated into a 4-bit folder first.
        machine: as it was before anything was loaded; None where nothing is yet.

    Returns:
        the plans, and what would be asked if every choice were the planner's.

    Raises:
        PlanError: nothing fits the budget.
        ModelError: most of the model would not be in four bits.
        ConfigError: target_modules names no layer.
    """
    not_streamed = why_not_streamed(config, None if folder_to_come else source, skeleton)
    files = source.files() if isinstance(source, FolderSource) and source.quant_spec is not None else ()
    asked, freed = asks(
        config,
        skeleton,
        deal=deal,
        dtype=dtype,
        on_cpu=device.type == "cpu",
        not_streamed=not_streamed,
        formats=source.layer_formats if isinstance(source, FolderSource) and source.quant_spec else formats,
        in_four_bits=stored_in_four_bits(source, skeleton),
    )
    if config.format != "none":
        check_dense_share(asked.shape.parts, source.name, config.max_dense_share)
    machine = machine or this_machine(device, dtype, config.memory, model_files=files)
    plans = make_plans(asked, machine)
    if config.memory is not None:
        planner.require(plans, asked, freed)
    return plans, freed


def stored_in_four_bits(source: ModelSource, skeleton: "PreTrainedModel") -> set[str] | None:
    """The linear layers that a source in four bits has in four bits; None of any other source."""
    if source.quant_spec is None:
        return None
    placed = place_tensors(source, skeleton)
    return {place.target.removesuffix(".weight") for place in placed if source.is_quantized(place.name)}


def check_peak(plans: Plans, freed: Ask, peak_bytes: int) -> None:
    """Refuse a plan whose rehearsal took more than the budget, and name the nearest that should not.

    Raises:
        PlanError: it did.
    """
    assert plans.chosen is not None
    budget, excess = plans.machine.budget_bytes, peak_bytes - plans.chosen.peak_bytes
    if peak_bytes <= budget:
        return
    nearest = make_plans(freed, replace(plans.machine, budget_bytes=budget - excess)).chosen
    raise PlanError(
        f"The rehearsal of the largest micro-batch took {format_bytes(peak_bytes)}, planned were "
        f"{format_bytes(plans.chosen.peak_bytes)}; the budget is {format_bytes(budget)}.",
        "" if nearest is None else f"What should fit: {nearest.describe()}.",
        f"Raise --memory to {format_bytes(1.05 * peak_bytes)}"
        + ("." if nearest is None else f", or add {nearest.flags()}."),
    )


def why_not_streamed(
    options: TrainConfig | PlanConfig, source: ModelSource | None, skeleton: "PreTrainedModel"
) -> Reason | None:
    """None where the base's blocks can be read from its folder while it trains, else the reason.

    Args:
        source: None where it is a 4-bit folder that is still to be made.
    """
    if source is None:
        return None
    linears = [f"{name}.weight" for name in quantizable_linears(skeleton)]
    stored = set(source.tensor_names())
    if isinstance(source, FolderSource) and all(n in stored and source.is_quantized(n) for n in linears):
        return None
    return needs_folder(options)


def needs_folder(options: TrainConfig | PlanConfig) -> Reason:
    """Blocks are read from a four-bit folder only; the way there is the command that makes one of this model."""
    command, folder = quantize_command(options)
    return Reason(Cause.NEEDS_FOLDER, "read from a 4-bit folder only", f"{command}, then --model {shlex.quote(folder)}")


def asks(
    options: TrainConfig | PlanConfig,
    skeleton: "PreTrainedModel",
    *,
    deal: Callable[[int], MicroBatches],
    dtype: torch.dtype,
    on_cpu: bool,
    not_streamed: Reason | None,
    formats: BaseFormats | None,
    in_four_bits: set[str] | None = None,
) -> tuple[Ask, Ask]:
    """What a run with these options asks of the planner, and the same with every choice left to it.

    Args:
        skeleton: the model on the meta device.
        deal: most rows at once -> what the run's micro-batches come to.
        not_streamed: None where blocks of the base can be read from its folder.
        formats: of a model that is already in four bits, or what was chosen; None where the options tell it.
        in_four_bits: names of the linear layers that a source in four bits has so; None where all will be.

    Raises:
        ConfigError: target_modules names no layer.
    """
    names = options.target_modules if isinstance(options.target_modules, str) else list(options.target_modules)
    targets = resolve_targets(skeleton, names)
    if ends := [name for name in end_modules(skeleton) if name in targets]:
        sentence = f"the adapter on {ends[0]} needs it in memory"
        not_streamed = Reason(Cause.OPTION, sentence, "--target-modules without it")
    config = skeleton.config.get_text_config()
    blocks = options.packing and not options.dropout and on_cpu and why_not_config(config) is None
    shape = ModelShape.of(skeleton, in_four_bits)

    def ask(freely: bool) -> Ask:
        return ask_for(
            options,
            shape,
            deal=deal,
            targets={name: linear_features(skeleton.get_submodule(name)) for name in targets},
            path="blocks" if blocks else "generic",
            dtype=dtype,
            on_cpu=on_cpu,
            not_streamed=not_streamed,
            formats=formats,
            freely=freely,
        )

    return ask(freely=False), ask(freely=True)


def ask_for(
    options: TrainConfig | PlanConfig,
    shape: ModelShape,
    *,
    deal: Callable[[int], MicroBatches],
    targets: Mapping[str, tuple[int, int]],
    path: str,
    dtype: torch.dtype,
    on_cpu: bool,
    not_streamed: Reason | None,
    formats: BaseFormats | None,
    freely: bool,
) -> Ask:
    """What a run asks of the planner.

    Args:
        targets: the layers that get an adapter: name -> (in_features, out_features).
        path: "blocks" or "generic".
        freely: leave every choice to the planner, whatever the options say.

    The others as in `asks`.
    """
    page = "auto" if freely else options.page_optimizer
    keeps = get_args(Keep) if options.keep == "auto" or freely else (options.keep,)
    sizes = [max(1, min(options.rows_per_step, MICRO_BATCH_TOKENS // deal(1).longest_row))]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    if options.micro_batch_size and not freely:
        sizes = [options.micro_batch_size]
    format = DEFAULT_FORMAT if options.format == "none" else options.format
    return Ask(
        shape=shape,
        batches={size: deal(size) for size in sizes},
        rows_per_step=options.rows_per_step,
        keeps=tuple(keeps),
        adapter_parameters=options.rank * sum(map(sum, targets.values())),
        largest_adapter=options.rank * max(max(sizes) for sizes in targets.values()),
        adapted=tuple(targets),
        rank=options.rank,
        compute_bytes=dtype.itemsize,
        spec=formats.spec if formats else QuantSpec(format, options.block_size, options.double_quant),
        path=path,
        dropout=options.dropout > 0,
        chunk_bytes=CHUNK_BYTES,
        panel_bytes=PANEL_BYTES,
        pagings={"auto": (False, True), "never": (False,), "always": (True,)}[page],
        offloads=_offloads("auto" if freely else options.offload_activations, path, on_cpu),
        mixed_bits=mean_bits(shape, formats) if formats and formats.layers else options.mixed,
        adam_bytes=ADAM_BYTES if options.optimizer_bits == 32 else ADAM_8BIT_BYTES,
        barred=_barred(options, shape, "auto" if freely else options.stream_base, page, not_streamed),
    )


def _offloads(wanted: str, path: str, on_cpu: bool) -> tuple[bool, ...]:
    if wanted == "never" or (on_cpu and path != "blocks"):
        return (False,)
    return (True,) if wanted == "always" else (False, True)


def _barred(
    options: TrainConfig | PlanConfig, shape: ModelShape, stream: str, page: str, not_streamed: Reason | None
) -> dict[str, Reason]:
    """Strategy -> why these options do not allow it."""
    bars: dict[str, list[Reason]] = {}

    def bar(strategies: Iterable[str], reason: Reason) -> None:
        for strategy in strategies:
            bars.setdefault(strategy, []).append(reason)

    bar([planner.FULL], Reason(Cause.COMPARISON, "nybble trains adapters; for comparison"))
    if options.format == "none":
        bar(FOUR_BIT, Reason(Cause.OPTION, "--format none keeps 16 bits", f"--format {DEFAULT_FORMAT}"))
    else:
        bar([planner.LORA16], Reason(Cause.OPTION, "not asked for", "--format none"))
    if shape.parts.dense_share > options.max_dense_share:
        bar(FOUR_BIT, Reason(Cause.MOSTLY_DENSE, partly_dense(shape.parts), accepting(shape.parts)))
    if page != "auto":
        paged = planner.PAGED if page == "never" else planner.FOUR
        bar([paged], Reason(Cause.OPTION, f"--page-optimizer {page}", "--page-optimizer auto"))
    if stream == "always":
        reason = Reason(Cause.OPTION, "--stream-base always", "--stream-base auto")
        bar((planner.FOUR, planner.PAGED), reason)
    if options.init != "default":
        bar(STREAMED, Reason(Cause.OPTION, f"--init {options.init} needs the whole base", "--init default"))
    if not_streamed is not None:
        bar(STREAMED, not_streamed)
    if stream == "never":
        bar(STREAMED, Reason(Cause.OPTION, "--stream-base never", "--stream-base auto"))
    return {strategy: _together(reasons) for strategy, reasons in bars.items()}


def _together(reasons: list[Reason]) -> Reason:
    """The first, and what takes away all of them."""
    ways = [reason.way for reason in reasons]
    return replace(reasons[0], way=", and ".join(ways) if all(ways) else "")


# options of a run that `nybble quantize` has too and that decide what its folder is
QUANTIZE_FLAGS = ("tokenizer", "format", "block_size", "double_quant", "mixed", "max_dense_share")


def quantize_command(options: TrainConfig | PlanConfig) -> tuple[str, str]:
    """The command that makes a four-bit folder as these options want one, and the folder's name."""
    format = DEFAULT_FORMAT if options.format == "none" else options.format
    folder = f"{Path(options.model).expanduser().absolute().name.removesuffix('.gguf')}-{format}"
    words = ["nybble", "quantize", "--model", options.model, "--out", folder]
    for name in QUANTIZE_FLAGS:
        value = getattr(options, name)
        if value not in (type(options).model_fields[name].default, "none"):
            flag = f"--{'no-' if value is False else ''}{yaml_key(name)}"
            words += [flag] if isinstance(value, bool) else [flag, str(value)]
    return shlex.join(words), folder
