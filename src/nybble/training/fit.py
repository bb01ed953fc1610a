"""How a run fits, and the model in memory as its plan says."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nybble import openmp
from nybble.errors import PlanError
from nybble.events import Listener, Note, silent
from nybble.kernels.hardware import describe_unproven
from nybble.layers.backbone import KeptTensors
from nybble.layers.batch_model import BatchModel
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import adapters_of, add_new_adapters, describe_untouched, remove_adapters
from nybble.layers.full_weights import train_weights
from nybble.layers.lora import lora_scaling
from nybble.layers.pictured_lm import describe_towers
from nybble.layers.token_rows import train_rows
from nybble.layers.trained import train_modules
from nybble.memory.measure import has_own_memory, used_bytes
from nybble.memory.offload import activation_place
from nybble.memory.store import FolderBlockStore, open_store
from nybble.options.adapter_groups import TAKES_FROM_BASE
from nybble.options.option import with_options
from nybble.planning.planner import Plan, Plans
from nybble.planning.report import Planned
from nybble.planning.request import plan_run
from nybble.planning.strategies import PlanRequest, Strategy
from nybble.quantization.adapter_init import (
    STATISTICS_BYTES,
    initialise_adapters,
    shared_out_ranks,
    start_along_inputs,
)
from nybble.quantization.sensitivity import some_windows
from nybble.runs.adapter_files import restore_adapter
from nybble.runs.base import data_free_rounding
from nybble.runs.folder import RunFolder
from nybble.sources.load import load_model
from nybble.sources.stored_model import StoredModel
from nybble.training.base import Base, text_of_rows
from nybble.training.objectives import make_regularisers
from nybble.training.rank import is_probed, probe_rank
from nybble.training.start import Examples, Opened, micro_batches_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel


INIT_TOKENS = 8192  # of the text that --init activation and eva take the layers' inputs from


@dataclass(frozen=True)
class Fit:
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


def plan_fit(opened: Opened, examples: Examples, base: Base, report: Listener) -> Fit:
    """The plan, and the streamed base's store opened."""
    dtype, device = opened.dtype, opened.device
    count = len(examples.new_tokens)
    plans, unconstrained = plan_run(
        opened.config, base.source, base.formats, examples.micro_batches, dtype, device, new_tokens=count
    )
    report(Planned(plans, unconstrained))
    fit = Fit(plans, unconstrained, None)
    return replace(fit, store=open_blocks(base.source, fit.plan, device))


def load_base(opened: Opened, base: Base, fit: Fit, report: Listener) -> "PreTrainedModel":
    """The frozen base, without adapters; or the base with every weight trained."""
    if opened.config.method.method == "full":
        model = load_model(base.source, None, torch.float32, opened.device, narrow_ends=False, report=report)
        train_weights(model, opened.dtype)
        return model
    return load_model(
        base.source,
        base.formats,
        opened.dtype,
        opened.device,
        data_free_rounding(opened.config.rounding),
        stream_linears_of=() if fit.store is None else base.source.streamed_layers,
        stream_ends=fit.plan.stream_ends,
        seed=opened.config.data.seed,
        report=report,
    )


def attach(
    opened: Opened, examples: Examples, base: Base, fit: Fit, model: "PreTrainedModel", report: Listener
) -> Opened:
    """Put what is trained onto the base, in place, as training begins with it; the options with the rank settled."""
    if opened.config.method.method == "full":
        return opened  # every weight is trained already
    adapters, seed = opened.config.adapters, opened.config.data.seed
    add_new_adapters(model, adapters, seed)
    if is_probed(opened):
        _, causal_lm = choose_path(opened, examples, base, fit, model, silent)
        assert isinstance(causal_lm, CausalLM), "ranks are probed of language models"
        rank = probe_rank(opened, examples, causal_lm, fit.plan.micro_batch_size, report)
        del causal_lm
        opened = replace(opened, config=with_options(opened.config, rank=rank))
        adapters = opened.config.adapters
        remove_adapters(model)
        add_new_adapters(model, adapters, seed)
    if adapters.eva_rho > 1 and opened.resumed is None:
        windows, statistics_bytes = _windows(opened, examples), _statistics_bytes(opened, fit)
        ranks = shared_out_ranks(model, windows, adapters.eva_rho, statistics_bytes)
        opened = replace(opened, config=with_options(opened.config, **_with_ranks(model, ranks)))
        adapters = opened.config.adapters
        report(Note(_describe_ranks(ranks)))
        remove_adapters(model)
        add_new_adapters(model, adapters, seed)
    train_modules(model, opened.source.head_modules)
    if examples.new_tokens:
        train_rows(model, examples.new_tokens)
    if adapters.init in TAKES_FROM_BASE:
        for adapter in adapters_of(model).values():
            adapter.taken_by = adapters.init  # a checkpoint has what that was
    if adapters.init != "default" and opened.resumed is None:
        _begin_adapters(opened, examples, base, model, _statistics_bytes(opened, fit))
    if opened.continued is not None:
        restore_adapter(model, opened.continued.folder, opened.source.head_modules)
    return opened


def _begin_adapters(
    opened: Opened, examples: Examples, base: Base, model: "PreTrainedModel", statistics_bytes: int
) -> None:
    """What --init says."""
    init = opened.config.adapters.init
    if init in TAKES_FROM_BASE:
        assert base.residual is not None
        for name, adapter in adapters_of(model).items():
            adapter.start_from(*base.residual.hand_over(name))
        return
    if init == "eva":
        start_along_inputs(model, _windows(opened, examples), statistics_bytes)
    else:
        windows = None if init == "loftq" else _windows(opened, examples)
        initialise_adapters(model, opened.source, windows, statistics_bytes)


def _windows(opened: Opened, examples: Examples) -> Tensor:
    """The text that layers' inputs are seen on."""
    return some_windows(text_of_rows(opened, examples).windows, INIT_TOKENS)


def _statistics_bytes(opened: Opened, fit: Fit) -> int:
    free = (fit.plan.peak_bytes - used_bytes(opened.device)) // 2  # of what training takes; half for the windows' pass
    return min(free, STATISTICS_BYTES)


def _with_ranks(model: "PreTrainedModel", ranks: Mapping[str, int]) -> dict[str, Any]:
    """Options of adapters with these ranks; each layer's product is scaled as it was, as PEFT has it."""
    old = adapters_of(model)
    names = [name for name in old if ranks.get(name, 1)]
    changed = {name: rank for name, rank in ranks.items() if rank and rank != old[name].rank}
    alphas = {name: old[name].alpha for name in names}
    for name, rank in changed.items():
        alphas[name] *= lora_scaling(1.0, old[name].rank, old[name].rslora) / lora_scaling(1.0, rank, old[name].rslora)
    return {
        "target_modules": tuple(names),
        "rank_pattern": {re.escape(name): ranks.get(name, old[name].rank) for name in names},
        "alpha_pattern": {re.escape(name): alpha for name, alpha in alphas.items()},
    }


def _describe_ranks(ranks: Mapping[str, int]) -> str:
    by_leaf: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        by_leaf.setdefault(name.rpartition(".")[2], []).append(rank)
    listed = ", ".join(f"{leaf} {min(own)} to {max(own)}" for leaf, own in by_leaf.items())
    none = sum(not rank for rank in ranks.values())
    return f"ranks by explained variance, {sum(ranks.values())} together: {listed}" + (
        f"; {none} layers get no adapter" if none else ""
    )


def choose_path(
    opened: Opened,
    examples: Examples,
    base: Base,
    fit: Fit,
    model: "PreTrainedModel",
    report: Listener,
) -> tuple[Fit, BatchModel]:
    """What computes the model; planned again where it cannot take rows side by side."""
    packing, plan = opened.config.memory.packing, fit.plan
    kept = _place_for_kept(plan, opened.run, opened.device)
    choose = partial(examples.objective.model.of, model, packing=packing, store=fit.store, kept=kept)
    causal_lm = choose(keep=plan.keep, whole_blocks=plan.whole_blocks)
    if causal_lm.packed != packing:
        fit = _plan_padded(opened, examples, base, fit)
        report(Note(f"planned again, for padded rows: {fit.plan.describe()}"))
        if fit.plan.keep != plan.keep:
            causal_lm = choose(keep=fit.plan.keep, whole_blocks=fit.plan.whole_blocks)
    causal_lm.regularise(make_regularisers(opened.config.objective))
    report(Note(f"computing through: {causal_lm.name}"))
    for note in () if opened.config.method.method == "full" else (*describe_towers(model), *describe_untouched(model)):
        report(Note(note))
    if (unproven := describe_unproven(opened.device)) is not None:
        report(Note(unproven, warning=True))
    if openmp.waiting == "unknown" and not has_own_memory(opened.device):
        report(Note(f"threads wait {openmp.SENTENCES['unknown']}", warning=True))
    return fit, causal_lm


def _plan_padded(opened: Opened, examples: Examples, base: Base, packed: Fit) -> Fit:
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
        micro_batches_for(padded, base.source, examples.data, examples.num_steps, opened.device, opened.dtype),
        opened.dtype,
        opened.device,
        machine=packed.plans.machine,
        new_tokens=len(examples.new_tokens),
    )
    fit = Fit(plans, unconstrained, packed.store)
    plan = fit.plan
    if (plan.resident_blocks, plan.offloaded) != (loaded.resident_blocks, loaded.offloaded):
        raise PlanError(
            "The plan is for rows side by side, which this model mixes, and padded rows need another.",
            f"What fits padded: {plan.describe()}.",
            "Plan for them from the beginning: add --no-packing.",
        )
    return fit


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
