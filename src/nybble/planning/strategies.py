"""What is asked of the planner, and the strategies that can answer: one entry of `Strategy`, one function of `WAYS`.

Such a function gives each way in which a run can be done: what it fixes itself is in them, what the request leaves open
comes in every variant. Bytes and seconds are then counted for a strategy by nothing but those run shapes.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum, auto
from typing import TYPE_CHECKING

from nybble.planning.base_costs import block_bytes, end_bytes
from nybble.planning.block_costs import kept_bytes
from nybble.planning.costs import MARGIN, predict
from nybble.planning.machine_table import Machine
from nybble.planning.run_shape import MicroBatches, RunShape
from nybble.sizes import PAGE_BUFFERS, PAGE_BYTES

if TYPE_CHECKING:
    from nybble.layers.decoder_block import Keep
    from nybble.options.method_groups import Method

STREAMED_ENDS_BYTES = 2**28  # smaller embeddings and heads stay resident


class Strategy(StrEnum):
    """How the weights of a run and its optimizer's state lie in memory; the value is its name for the user.

    The planner tries each through `WAYS`, in this order. `request.reasons_against` says which of them options exclude.
    Training opens a block store for those that are streamed, in pinned memory for FROM_RAM where there is a GPU.
    """

    FULL = "full 16-bit"  # every weight trained
    LORA_16 = "LoRA 16-bit"  # adapters on the 16-bit base
    FOUR_BIT = "4-bit"  # QLoRA, all of it in memory
    PAGED = "4-bit, optimizer paged"  # its state in a file
    FROM_RAM = "4-bit, base from RAM"  # blocks read where they are used, from memory beside the budget
    FROM_DISK = "4-bit, base from disk"  # the same from a folder that no memory holds

    @property
    def four_bit(self) -> bool:
        """Whether the base is in four bits."""
        return self not in (Strategy.FULL, Strategy.LORA_16)

    @property
    def streamed(self) -> bool:
        """Whether blocks of the base are read where they are used."""
        return self in (Strategy.FROM_RAM, Strategy.FROM_DISK)


METHODS: "tuple[Method, ...]" = ("qlora", "lora", "full")


def method_of(strategy: Strategy) -> "Method":
    """Which --method it is a way of."""
    if strategy.four_bit:
        return "qlora"
    return "full" if strategy is Strategy.FULL else "lora"


class Cause(StrEnum):
    """What a plan is not taken for; the value stands in `plan.json`.

    `Plans.reason` gives SLOWER to what fits; `planner.require` names the command that makes the folder that a plan
    NEEDS_FOLDER. The others are for whoever reads `plan.json`.
    """

    OPTION = auto()  # the user's options say otherwise
    NEEDS_FOLDER = auto()  # blocks are read from a four-bit folder, and this base is none
    MOSTLY_DENSE = auto()  # the model would not be four-bit
    BUDGET = auto()  # it takes more memory than it may
    BESIDE = auto()  # it takes more memory beside the budget than there is
    SLOWER = auto()  # it fits, and another is faster


@dataclass(frozen=True)
class Reason:
    """Why a plan is not taken.

    Args:
        sentence: for the user.
        way: options or commands that open it; empty where nothing does.
    """

    cause: Cause
    sentence: str
    way: str = ""


@dataclass(frozen=True)
class PlanRequest:
    """What a run wants of the planner.

    Args:
        run: what is not chosen; its batches, and what it keeps, stand for any of those to choose among.
        batches: rows at once, to choose among -> what micro-batches of so many rows come to.
        rows_per_step: of one optimizer step.
        keeps: what blocks may keep, to choose among.
        pagings: whether the optimizer's state may be paged, to choose among.
        offloads: whether what blocks keep may go to a file, to choose among.
        whole_blocks: the last so many keep everything; None where that is chosen.
        adapted: names of the layers that get an adapter.
        largest_adapter: parameters of the largest A or B, or weight of a module that is trained whole.
        excluded: strategy -> why this run cannot use it.
    """

    run: RunShape
    batches: Mapping[int, MicroBatches]
    rows_per_step: int
    keeps: "tuple[Keep, ...]"
    pagings: tuple[bool, ...]
    offloads: tuple[bool, ...]
    whole_blocks: int | None
    adapted: tuple[str, ...]
    largest_adapter: int
    excluded: Mapping[Strategy, Reason]


def _full_16_bit(request: PlanRequest, run: RunShape, machine: Machine) -> Iterable[RunShape]:
    """Through transformers' modules: decoder blocks give weights no gradient."""
    own = {"adapter_parameters": 0, "rank": 0, "other_ranks": (), "dropout": False, "dora": False}
    own |= {"trained_parameters": 0, "largest_trained": 0, "trained_head": False}
    whole = replace(run, **own, spec=None, average_bits=None, most_bits=None, full=True, path="generic")  # type: ignore[arg-type]
    return _resident(request, whole, machine, request.pagings)


def _lora_16_bit(request: PlanRequest, run: RunShape, machine: Machine) -> Iterable[RunShape]:
    return _resident(request, replace(run, spec=None), machine, request.pagings)


def _four_bit(request: PlanRequest, run: RunShape, machine: Machine) -> Iterable[RunShape]:
    return _resident(request, run, machine, (False,))


def _optimizer_paged(request: PlanRequest, run: RunShape, machine: Machine) -> Iterable[RunShape]:
    return _resident(request, run, machine, (True,))


def _base_from_ram(request: PlanRequest, run: RunShape, machine: Machine) -> Iterable[RunShape]:
    for variant in _variants(request, run, request.pagings):
        yield streamed_run(replace(variant, from_ram=True), machine)


def _base_from_disk(request: PlanRequest, run: RunShape, machine: Machine) -> Iterable[RunShape]:
    for variant in _variants(request, run, request.pagings):
        yield streamed_run(variant, machine)


WAYS: Mapping[Strategy, Callable[[PlanRequest, RunShape, Machine], Iterable[RunShape]]] = {
    Strategy.FULL: _full_16_bit,
    Strategy.LORA_16: _lora_16_bit,
    Strategy.FOUR_BIT: _four_bit,
    Strategy.PAGED: _optimizer_paged,
    Strategy.FROM_RAM: _base_from_ram,
    Strategy.FROM_DISK: _base_from_disk,
}


def _variants(request: PlanRequest, run: RunShape, pagings: tuple[bool, ...]) -> Iterable[RunShape]:
    """With the optimizer's state paged or not, and what blocks keep offloaded or not."""
    largest = run.model.largest_matrix if run.full else request.largest_adapter
    largest_page = max(PAGE_BYTES, int(run.adam_bytes * largest))
    if run.keep != "everything":
        run = replace(run, whole_blocks=request.whole_blocks or 0)
    for paged in pagings:
        stays = run.keep == "everything" or run.whole_blocks or (run.full and run.on_cpu)
        for offload in (False,) if stays else request.offloads:
            yield replace(run, page_bytes=PAGE_BUFFERS * largest_page if paged else None, offload=offload)


def _resident(request: PlanRequest, run: RunShape, machine: Machine, pagings: tuple[bool, ...]) -> Iterable[RunShape]:
    """Each variant, and on a GPU each with as many blocks that keep everything as the budget has room for, unless that
    is given.
    """
    for variant in _variants(request, run, pagings):
        yield variant
        if request.whole_blocks is not None:
            continue
        more = kept_bytes(replace(variant, keep="everything")) - kept_bytes(variant)
        if variant.wide and len(request.keeps) > 1 and more and not variant.offload:
            room = machine.budget_bytes - machine.begun_bytes - sum(predict(variant).values())
            if (whole_blocks := min(room // more, run.model.num_layers - 1)) > 0:
                yield replace(variant, whole_blocks=whole_blocks)


def streamed_run(run: RunShape, machine: Machine) -> RunShape:
    """With as many blocks resident as the budget has room for, at most all but one."""
    run = replace(run, resident_blocks=0, stream_ends=end_bytes(run.model) >= STREAMED_ENDS_BYTES)
    room = machine.budget_bytes - machine.begun_bytes - sum(predict(run).values())
    largest = max(block_bytes(block, run.spec, run.block_bits) for block, _ in run.model.parts.blocks)
    per_block = (1 + (MARGIN if run.on_cpu else 0)) * max(1, largest)
    return replace(run, resident_blocks=min(max(0, int(room / per_block)), run.model.num_layers - 1))
