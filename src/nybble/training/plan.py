"""A run's plan: what is asked of the planner, what it chose, shown before and compared with what was measured."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from nybble.config import PlanConfig, TrainConfig
from nybble.errors import PlanError
from nybble.formats.quantized_tensor import LayerSpecs, QuantSpec
from nybble.layers.backbone import why_not_config
from nybble.layers.convert import quantizable_linears, resolve_targets
from nybble.layers.decoder_block import Keep
from nybble.layers.lora import linear_features
from nybble.layers.loss_head import CHUNK_BYTES, PANEL_BYTES
from nybble.memory import planner
from nybble.memory.costs import ADAM_8BIT_BYTES, ADAM_BYTES, MicroBatches, ModelShape, mean_bits
from nybble.memory.machine import this_machine
from nybble.memory.measure import PeakMemory
from nybble.memory.planner import Ask, Plan, Plans, make_plans
from nybble.models.folder_source import FolderSource
from nybble.models.interface import ModelSource
from nybble.training.base import QualityChoice
from nybble.training.display import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MICRO_BATCH_TOKENS = 2048  # what one micro-batch aims at when its size is not given
FOUR_BIT = (planner.FOUR, planner.PAGED, planner.FROM_RAM, planner.FROM_DISK)


def plan_run(
    config: TrainConfig,
    source: ModelSource,
    skeleton: "PreTrainedModel",
    specs: QuantSpec | LayerSpecs | None,
    deal: Callable[[int], MicroBatches],
    dtype: torch.dtype,
    device: torch.device,
    folder_to_come: bool = False,
) -> tuple[Plans, Ask]:
    """Choose how to train before anything is loaded; what the config says is not chosen.

    Args:
        skeleton: the model on the meta device.
        specs: what the linears of the blocks are quantised to, where the source is not quantised.
        deal: most rows at once -> what the run's micro-batches come to.
        folder_to_come: the source will be calibrated into a 4-bit folder first.

    Returns:
        the plans, and what would be asked if every choice were the planner's.

    Raises:
        PlanError: nothing fits the budget.
        ConfigError: target_modules names no layer.
    """
    text_config = skeleton.config.get_text_config()
    names = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    targets = [linear_features(skeleton.get_submodule(name)) for name in resolve_targets(skeleton, names)]
    blocks = config.packing and not config.dropout and device.type == "cpu" and why_not_config(text_config) is None
    path = "blocks" if blocks else "generic"
    not_streamed = why_not_streamed(None if folder_to_come else source, skeleton, config.init)

    def ask(freely: bool) -> Ask:
        return ask_for(
            config,
            ModelShape.from_config(text_config.to_dict()),
            deal=deal,
            adapter_parameters=config.rank * sum(map(sum, targets)),
            path=path,
            dtype=dtype,
            on_cpu=device.type == "cpu",
            spec=source.quant_spec,
            specs=source.layer_specs if isinstance(source, FolderSource) and source.quant_spec else specs,
            why_not_streamed=not_streamed,
            freely=freely,
        )

    files = source.files() if isinstance(source, FolderSource) and source.quant_spec is not None else ()
    machine = this_machine(device, dtype, config.memory, model_files=files)
    asked, freed = ask(freely=False), ask(freely=True)
    plans = make_plans(asked, machine)
    if config.memory is not None:
        planner.require(plans, asked, freed)
    return plans, freed


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


def why_not_streamed(source: ModelSource | None, skeleton: "PreTrainedModel", init: str) -> str | None:
    """None where the base's blocks can be read from its folder while it trains, else the reason.

    Args:
        source: None where it is a 4-bit folder that is still to be made.
    """
    if init != "default":
        return f"--init {init} needs the whole base"
    if source is None:
        return None
    linears = [f"{name}.weight" for name in quantizable_linears(skeleton)]
    stored = set(source.tensor_names())
    if isinstance(source, FolderSource) and all(n in stored and source.is_quantized(n) for n in linears):
        return None
    return "read from a 4-bit folder only, which `nybble quantize` makes"


def ask_for(
    options: TrainConfig | PlanConfig,
    shape: ModelShape,
    *,
    deal: Callable[[int], MicroBatches],
    adapter_parameters: int,
    path: str,
    dtype: torch.dtype,
    on_cpu: bool,
    why_not_streamed: str | None,
    spec: QuantSpec | None = None,
    specs: QuantSpec | LayerSpecs | None = None,
    freely: bool = False,
) -> Ask:
    """What a run with these options asks of the planner.

    Args:
        deal: most rows at once -> what the run's micro-batches come to.
        path: "blocks" or "generic".
        why_not_streamed: None where blocks of the base can be read from its folder.
        spec: of a model that is already in four bits.
        specs: of each layer where they differ; anything else is told by `spec` or the options.
        freely: leave every choice to the planner, whatever the options say.
    """
    page = "auto" if freely else options.page_optimizer
    keeps = get_args(Keep) if options.keep == "auto" or freely else (options.keep,)
    sizes = [max(1, min(options.rows_per_step, MICRO_BATCH_TOKENS // deal(1).longest_row))]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    if options.micro_batch_size and not freely:
        sizes = [options.micro_batch_size]
    format = "nf4" if options.format == "none" else options.format
    return Ask(
        shape=shape,
        batches={size: deal(size) for size in sizes},
        rows_per_step=options.rows_per_step,
        keeps=tuple(keeps),
        adapter_parameters=adapter_parameters,
        largest_adapter=options.rank * max(max(linear) for linear in shape.linears),
        rank=options.rank,
        compute_bytes=dtype.itemsize,
        spec=spec or QuantSpec(format, options.block_size, options.double_quant),
        path=path,
        dropout=options.dropout > 0,
        chunk_bytes=CHUNK_BYTES,
        panel_bytes=PANEL_BYTES,
        pagings={"auto": (False, True), "never": (False,), "always": (True,)}[page],
        offloads=_offloads("auto" if freely else options.offload_activations, path, on_cpu),
        mixed_bits=mean_bits(shape, specs) if isinstance(specs, Mapping) else options.mixed,
        adam_bytes=ADAM_BYTES if options.optimizer_bits == 32 else ADAM_8BIT_BYTES,
        barred=_barred(options, "auto" if freely else options.stream_base, page, why_not_streamed),
    )


def _offloads(wanted: str, path: str, on_cpu: bool) -> tuple[bool, ...]:
    if wanted == "never" or (on_cpu and path != "blocks"):
        return (False,)
    return (True,) if wanted == "always" else (False, True)


def _barred(options: TrainConfig | PlanConfig, stream: str, page: str, why_not_streamed: str | None) -> dict[str, str]:
    """Strategy -> why these options do not allow it."""
    barred = {planner.FULL: "nybble trains adapters; for comparison"}
    if options.format == "none":
        barred |= dict.fromkeys(FOUR_BIT, "--format none keeps 16 bits")
    else:
        barred[planner.LORA16] = "asked for with --format none"
    if stream == "never" or why_not_streamed is not None:
        reason = why_not_streamed or "--stream-base never"
        barred = {planner.FROM_RAM: reason, planner.FROM_DISK: reason} | barred
    if stream == "always":
        barred = dict.fromkeys((planner.FOUR, planner.PAGED), "--stream-base always") | barred
    if page != "auto":
        barred = {planner.PAGED if page == "never" else planner.FOUR: f"--page-optimizer {page}"} | barred
    return barred


def show_plans(console: Console, plans: Plans) -> None:
    """A line for each strategy, then the chosen plan by component."""
    machine = plans.machine
    title = f"{machine.name}, {format_bytes(machine.budget_bytes)} to plan for"
    table = Table(title=title, title_justify="left")
    for name in ("strategy", "rows at once", "blocks keep", "peak", "step"):
        table.add_column(name, justify="left" if name in ("strategy", "blocks keep") else "right")
    for plan in plans.best:
        chosen = plans.chosen is not None and plan.strategy == plans.chosen.strategy
        shown = plans.chosen if chosen and plans.chosen is not None else plan
        strategy = shown.strategy
        if shown.resident_blocks is not None:
            strategy += f" ({shown.resident_blocks} blocks stay{', optimizer paged' if shown.paged else ''})"
        table.add_row(
            strategy,
            str(shown.micro_batch_size),
            shown.keep,
            format_bytes(shown.peak_bytes),
            f"{shown.step_s:.3g} s",
            style="bold" if chosen else None,
        )
    console.print(table)
    for plan in plans.rejected:
        console.print(f"not {plan.strategy}: {plan.why_not}", highlight=False)
    if plans.chosen is not None:
        show_components(console, plans.chosen)


def show_components(console: Console, plan: Plan) -> None:
    """The predicted memory by component."""
    table = Table(title=f"predicted memory: {plan.describe()}", title_justify="left")
    table.add_column("component")
    table.add_column("bytes", justify="right")
    for name, num_bytes in plan.components.items():
        table.add_row(name, format_bytes(num_bytes))
    table.add_row("peak", format_bytes(plan.peak_bytes), style="bold")
    console.print(table)


def show_measured(console: Console, plan: Plan, memory: PeakMemory, step_s: float) -> None:
    """Predicted against measured peak and step time."""
    console.print(
        f"peak memory: {format_bytes(memory.peak_bytes)} measured, {format_bytes(plan.peak_bytes)} predicted; "
        f"a step: {step_s:.3g} s measured, at most {plan.step_s:.3g} s predicted",
        highlight=False,
    )


def plans_json(plans: Plans, **about: Any) -> dict[str, Any]:
    """Machine, choice with what else there is to say `about` it, and each strategy that lost with its reason."""
    chosen = None if plans.chosen is None else plans.chosen.to_json()
    if chosen is not None:
        chosen = about | chosen
    return {
        "machine": {"name": plans.machine.name, "budget_bytes": plans.machine.budget_bytes},
        "chosen": chosen,
        "rejected": [plan.to_json() for plan in plans.rejected],
    }


def write_plan(
    path: Path, plans: Plans, backbone: str, quality: QualityChoice | None, measured: dict[str, float]
) -> None:
    """`plan.json`: what was chosen and predicted, why the others lost, and what was measured."""
    about = {"path": backbone, "quality": None if quality is None else asdict(quality)}
    record = plans_json(plans, **about) | {"measured": measured}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
