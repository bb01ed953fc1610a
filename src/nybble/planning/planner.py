"""What a run could do to fit: every strategy, micro-batch and choice of what blocks keep; the fastest that fits.

    full 16-bit              every weight trained; for comparison, nybble trains adapters
    LoRA 16-bit              adapters on the 16-bit base
    4-bit                    QLoRA, all of it in memory
    4-bit, optimizer paged   its state in a file
    4-bit, base from RAM     blocks of the base read where they are used, from memory beside the budget: the file cache,
                             or a GPU's pinned memory
    4-bit, base from disk    the same from a folder that no memory holds

Bytes come from `costs.predict`. Seconds are the products at the machine's speed, dequantisation and the optimizer at
that of its memory, a constant for each block entered, and reading where it takes longer than what it hides behind.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from nybble.errors import PlanError
from nybble.formats.quant_spec import QuantSpec
from nybble.memory.pager import BUFFERS, PAGE_BYTES
from nybble.planning.costs import (
    ADAM_BYTES,
    MARGIN,
    MicroBatches,
    ModelShape,
    TrainingShape,
    base_bytes,
    block_bytes,
    end_bytes,
    kept_bytes,
    predict,
    resident_bytes,
    work_of,
)
from nybble.planning.machine import Machine

if TYPE_CHECKING:
    from nybble.layers.decoder_block import Keep

KEEPS: "tuple[Keep, ...]" = ("everything", "attention", "nothing")
BLOCK_S = {"cpu": 5e-3, "cuda": 2e-4}  # a block's small kernels and their calls, forward or backward
STREAMED_ENDS_BYTES = 2**28  # smaller embeddings and heads stay resident
STREAMING_OVERHEAD = 1.03  # of a step; where two plans take as long, the simpler one is chosen
RUN_BYTES = 6_000_000  # modules, objects and threads that a run adds to its process after it was planned, measured
FULL, LORA16, FOUR, PAGED = "full 16-bit", "LoRA 16-bit", "4-bit", "4-bit, optimizer paged"
FROM_RAM, FROM_DISK = "4-bit, base from RAM", "4-bit, base from disk"
STRATEGIES = (FULL, LORA16, FOUR, PAGED, FROM_RAM, FROM_DISK)


class Cause(Enum):
    """What a plan is not taken for."""

    COMPARISON = auto()  # nybble has no such way to train
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
class Ask:
    """What a run wants.

    Args:
        shape: of the model.
        batches: rows at once, to choose among -> what micro-batches of so many rows come to.
        rows_per_step: of one optimizer step.
        keeps: to choose among.
        adapter_parameters, rank: P and r.
        adapted: names of the layers that get an adapter.
        largest_adapter: parameters of the largest A or B.
        compute_bytes: of an activation.
        spec: the 4-bit format; what strategies in 16 bits ignore.
        path: "blocks" or "generic".
        dropout: on the adapters' inputs.
        chunk_bytes, panel_bytes: of the loss head.
        pagings: whether the optimizer's state may be paged, to choose among.
        offloads: whether what blocks keep may go to a file, to choose among.
        barred: strategy -> why this run cannot use it.
        mixed_bits: bits a weight where the layers of the base have several formats.
        adam_bytes: of optimizer state a parameter.
    """

    shape: ModelShape
    batches: Mapping[int, MicroBatches]
    rows_per_step: int
    keeps: "tuple[Keep, ...]"
    adapter_parameters: int
    largest_adapter: int
    rank: int
    compute_bytes: int
    spec: QuantSpec
    path: str
    dropout: bool
    chunk_bytes: int
    panel_bytes: int
    pagings: tuple[bool, ...]
    offloads: tuple[bool, ...]
    barred: dict[str, Reason]
    adapted: tuple[str, ...] = ()
    mixed_bits: float | None = None
    adam_bytes: float = ADAM_BYTES


@dataclass(frozen=True)
class Plan:
    """One way to run, and what it should cost.

    Args:
        strategy: one of STRATEGIES.
        resident_blocks: of a streamed base, else None.
        stream_ends: embedding and head are read where they are used.
        paged: the optimizer's state is in a file.
        offloaded_bytes: what blocks keep in a file, or beside a GPU; 0 where they keep it in the memory planned.
        components: bytes at the highest moment; they add up to `peak_bytes`.
        step_s: seconds an optimizer step.
        batches: what its micro-batches come to.
        barred: why this run may not take it, whatever it needs; None where it may.
        too_large: why it does not fit; None where it does.
    """

    strategy: str
    micro_batch_size: int
    keep: "Keep"
    resident_blocks: int | None
    stream_ends: bool
    paged: bool
    offloaded_bytes: int
    components: dict[str, int]
    step_s: float
    batches: MicroBatches
    barred: Reason | None = None
    too_large: Reason | None = None

    @property
    def why_not(self) -> Reason | None:
        """None where it may be chosen."""
        return self.barred or self.too_large

    @property
    def way(self) -> str:
        """What opens a plan that would fit and may not be taken as things are; empty where nothing does."""
        return self.barred.way if self.barred is not None and self.too_large is None else ""

    @property
    def offloaded(self) -> bool:
        return self.offloaded_bytes > 0

    @property
    def peak_bytes(self) -> int:
        return sum(self.components.values())

    def describe(self) -> str:
        """Say in a few words what is chosen."""
        rows = "row" if self.micro_batch_size == 1 else "rows"
        words = [self.strategy, f"{self.micro_batch_size} {rows} at once", f"blocks keep {self.keep}"]
        words += ["offloaded"] if self.offloaded else []
        if self.resident_blocks is not None:
            words.append(f"{self.resident_blocks} blocks resident")
            words += ["embedding and head streamed"] if self.stream_ends else []
            words += ["optimizer paged"] if self.paged else []
        return ", ".join(words)

    def flags(self) -> str:
        """The options that ask for this plan."""
        words = [f"--micro-batch-size {self.micro_batch_size}", f"--keep {self.keep}"]
        words += [] if self.resident_blocks is None else ["--stream-base always"]
        words += ["--offload-activations always"] if self.offloaded else []
        return " ".join(words + (["--page-optimizer always"] if self.paged else []))

    def to_json(self, reason: Reason | None = None) -> dict[str, Any]:
        """Its values, and why it was not chosen."""
        fields = (
            "strategy",
            "micro_batch_size",
            "keep",
            "resident_blocks",
            "stream_ends",
            "paged",
            "offloaded",
            "peak_bytes",
        )
        record = {name: getattr(self, name) for name in fields}
        record |= {"step_s": round(self.step_s, 4), "components": self.components}
        if reason is not None:
            record |= {"why_not": reason.sentence, "cause": reason.cause.name.lower()}
        return record | ({"way": self.way} if self.way else {})


@dataclass(frozen=True)
class Plans:
    """Every candidate, and what was made of them.

    Args:
        chosen: the fastest that fits and is allowed, else None.
        best: of each strategy, the fastest that fits or else the smallest.
    """

    machine: Machine
    chosen: Plan | None
    best: tuple[Plan, ...]
    candidates: tuple[Plan, ...]

    @property
    def smallest(self) -> Plan:
        """The smallest plan of those that are allowed; of all where none is."""
        allowed = [plan for plan in self.candidates if plan.barred is None]
        return min(allowed or self.candidates, key=lambda plan: plan.peak_bytes)

    @property
    def rejected(self) -> tuple[Plan, ...]:
        """The best of each strategy that was not chosen."""
        return tuple(plan for plan in self.best if self.chosen is None or plan.strategy != self.chosen.strategy)

    def reason(self, plan: Plan) -> Reason:
        """Why this one was not chosen."""
        if plan.barred is not None and plan.too_large is not None and plan.barred.cause is not Cause.COMPARISON:
            return replace(plan.barred, sentence=f"{plan.barred.sentence}, and {plan.too_large.sentence}")
        if plan.why_not is not None:
            return plan.why_not
        assert self.chosen is not None, "a plan that fits and may be taken is"
        times = plan.step_s / self.chosen.step_s
        return Reason(Cause.SLOWER, f"fits, but a step takes {times:.2f} times as long")

    @property
    def openings(self) -> tuple[Plan, ...]:
        """What would fit and may not be taken as things are: of each way to open it the fastest."""
        found: dict[str, Plan] = {}
        for plan in sorted(self.candidates, key=lambda plan: (plan.step_s, plan.peak_bytes)):
            if plan.way:
                found.setdefault(plan.way, plan)
        return tuple(found.values())


def make_plans(ask: Ask, machine: Machine) -> Plans:
    """Every plan there is for `ask`, the choice among them, and the best of each strategy."""
    candidates = tuple(_candidates(ask, machine))
    fitting = [plan for plan in candidates if not plan.why_not]
    # Within one strategy seconds decide; memory that would be left over costs nothing.
    chosen = min(fitting, key=lambda plan: (plan.step_s, plan.peak_bytes), default=None)
    best = []
    for strategy in STRATEGIES:
        plans = [plan for plan in candidates if plan.strategy == strategy]
        within = [plan for plan in plans if plan.peak_bytes <= machine.budget_bytes]
        if within:
            best.append(min(within, key=lambda plan: (plan.step_s, plan.peak_bytes)))
        elif plans:
            best.append(min(plans, key=lambda plan: plan.peak_bytes))
    return Plans(machine, chosen, tuple(best), candidates)


def _candidates(ask: Ask, machine: Machine) -> Iterable[Plan]:
    for strategy in STRATEGIES:
        for size in ask.batches:
            for keep in ask.keeps:
                for paged in _pagings(ask, strategy):
                    for offloaded in (False,) if keep == "everything" or strategy == FULL else ask.offloads:
                        yield _plan(ask, machine, strategy, size, keep, paged, offloaded)


def _pagings(ask: Ask, strategy: str) -> tuple[bool, ...]:
    if strategy in (FOUR, PAGED):
        return (strategy == PAGED,)
    return (False,) if strategy == FULL else ask.pagings


def _plan(ask: Ask, machine: Machine, strategy: str, size: int, keep: "Keep", paged: bool, offloaded: bool) -> Plan:
    streamed = strategy in (FROM_RAM, FROM_DISK)
    stream_ends = streamed and end_bytes(ask.shape) >= STREAMED_ENDS_BYTES
    training = TrainingShape(
        batches=ask.batches[size],
        adapter_parameters=0 if strategy == FULL else ask.adapter_parameters,
        rank=0 if strategy == FULL else ask.rank,
        compute_bytes=ask.compute_bytes,
        spec=None if strategy in (FULL, LORA16) else ask.spec,
        path=ask.path,
        keep=keep,
        chunk_bytes=ask.chunk_bytes,
        mixed_bits=ask.mixed_bits,
        micro_batches=-(-ask.rows_per_step // size),
        resident_blocks=0 if streamed else None,
        stream_ends=stream_ends,
        panel_bytes=ask.panel_bytes,
        adam_bytes=ask.adam_bytes,
        page_bytes=BUFFERS * max(PAGE_BYTES, int(ask.adam_bytes * ask.largest_adapter)) if paged else None,
        offload=offloaded,
        dropout=ask.dropout,
        on_cpu=machine.kind == "cpu",
        full=strategy == FULL,
    )
    if streamed:
        room = machine.budget_bytes - _peak(ask, machine, training)
        largest = max(block_bytes(block, ask.spec, ask.mixed_bits) for block, _ in ask.shape.parts.blocks)
        per_block = (1 + (MARGIN if training.on_cpu else 0)) * max(1, largest)
        resident = min(max(0, int(room / per_block)), ask.shape.num_layers - 1)
        training = replace(training, resident_blocks=resident)
    components = {"the process itself": _process_bytes(machine)} | predict(ask.shape, training)
    offloaded_bytes = ask.shape.num_layers * kept_bytes(ask.shape, training) if offloaded else 0
    step_s = _step_seconds(ask, machine, training, strategy, paged)
    plan = Plan(
        strategy, size, keep, training.resident_blocks, stream_ends, paged, offloaded_bytes, components, step_s,
        training.batches,
    )  # fmt: skip
    return replace(plan, barred=ask.barred.get(strategy), too_large=_too_large(ask, machine, plan))


def _peak(ask: Ask, machine: Machine, training: TrainingShape) -> int:
    return _process_bytes(machine) + sum(predict(ask.shape, training).values())


def _process_bytes(machine: Machine) -> int:
    return machine.process_bytes + (RUN_BYTES if machine.kind == "cpu" else 0)


def _step_seconds(ask: Ask, machine: Machine, training: TrainingShape, strategy: str, paged: bool) -> float:
    """Seconds an optimizer step: every micro-batch as the largest, then the update."""
    work = work_of(ask.shape, training)
    compute = work.flops / machine.flops + 2 * work.weight_bytes / machine.ram_bytes_per_s
    compute += work.block_passes * BLOCK_S[machine.kind]
    speed = {FROM_RAM: machine.link_bytes_per_s, FROM_DISK: machine.disk_bytes_per_s}.get(strategy, float("inf"))
    if training.offload:
        compute += 2 * ask.shape.num_layers * kept_bytes(ask.shape, training) / machine.link_bytes_per_s
    trained = ask.shape.parameters if training.full else ask.adapter_parameters
    update = 28 * trained / machine.ram_bytes_per_s + (16 * trained / machine.link_bytes_per_s if paged else 0)
    micro_batch = compute if speed == float("inf") else STREAMING_OVERHEAD * max(compute, work.read_bytes / speed)
    return training.micro_batches * micro_batch + update


def _too_large(ask: Ask, machine: Machine, plan: Plan) -> Reason | None:
    if (excess := plan.peak_bytes - machine.budget_bytes) > 0:
        return Reason(Cause.BUDGET, f"needs {plan.peak_bytes / 1e9:.2f} GB, {excess / 1e9:.2f} GB too many")
    beside = _bytes_beside(ask, machine, plan)
    if beside > machine.host_bytes:
        there = f"there are {machine.host_bytes / 1e9:.2f} GB"
        return Reason(Cause.BESIDE, f"needs {beside / 1e9:.2f} GB of memory beside the budget; {there}")
    return None


def _bytes_beside(ask: Ask, machine: Machine, plan: Plan) -> int:
    """What the plan needs of the host's memory: blocks and ends that are streamed from there, what a GPU offloads."""
    offloaded = plan.offloaded_bytes if machine.kind == "cuda" else 0
    if plan.strategy != FROM_RAM:
        return offloaded
    assert plan.resident_blocks is not None
    stored = (ask.spec, ask.mixed_bits, ask.compute_bytes)
    streamed = base_bytes(ask.shape, *stored) - resident_bytes(ask.shape, *stored, plan.resident_blocks)
    ends = end_bytes(ask.shape) if plan.stream_ends else 0
    return offloaded + streamed + ends


def require(plans: Plans, ask: Ask, freed: Ask | None) -> Plan:
    """The chosen plan.

    Args:
        freed: the same run with every choice left to the planner, where the user fixed some.

    Raises:
        PlanError: nothing fits; the message names what would, with the options or commands that ask for it, else the
            smallest plan and what would change it.
    """
    if plans.chosen is not None:
        return plans.chosen
    smallest, machine = plans.smallest, plans.machine
    got = (
        f"The smallest plan takes {smallest.peak_bytes / 1e9:.2f} GB ({smallest.describe()}); "
        f"the budget is {machine.budget_bytes / 1e9:.2f} GB."
    )
    if smallest.barred is not None:
        got = f"No strategy is left. Not {smallest.strategy}: {plans.reason(smallest).sentence}."
    elsewise = make_plans(freed, machine) if freed is not None else plans
    if elsewise.chosen is not None:
        folders = [plan.way for plan in plans.openings if plan.barred and plan.barred.cause is Cause.NEEDS_FOLDER]
        as_they_are = f" As they are, they need a 4-bit folder: {folders[0]}." if folders else ""
        raise PlanError(
            got,
            f"What fits: {elsewise.chosen.describe()}, with {elsewise.chosen.peak_bytes / 1e9:.2f} GB.",
            f"Leave these options to nybble, or take {elsewise.chosen.flags()}.{as_they_are}",
        )
    openings = plans.openings or elsewise.openings
    if openings:
        described = [f"{plan.describe()}, with {plan.peak_bytes / 1e9:.2f} GB" for plan in openings]
        fixed = "" if plans.openings else " Leave the other options to nybble."
        ways = "; or ".join(plan.way for plan in openings)
        raise PlanError(got, f"What would fit: {'; or '.join(described)}.", f"Way out: {ways}.{fixed}")
    raise PlanError(got, _largest_parts(smallest), f"What would change it: {'; '.join(_ways_down(ask, machine))}.")


def _largest_parts(plan: Plan) -> str:
    parts = sorted(plan.components.items(), key=lambda part: -part[1])[:4]
    return "Its largest parts: " + ", ".join(f"{name} {num_bytes / 1e9:.2f} GB" for name, num_bytes in parts) + "."


def _ways_down(ask: Ask, machine: Machine) -> list[str]:
    """Changes of what is asked, each with the smallest plan's bytes after it."""

    def smallest(changed: Ask) -> str:
        return f"{make_plans(changed, machine).smallest.peak_bytes / 1e9:.2f} GB"

    half = replace(ask, batches={size: batches.halved() for size, batches in ask.batches.items()})
    longest = max(batches.longest_row for batches in half.batches.values())
    ways = [f"--max-seq-len {longest} ({smallest(half)})"]
    if ask.rank > 4:
        share = replace(
            ask, rank=4, adapter_parameters=ask.adapter_parameters * 4 // ask.rank,
            largest_adapter=ask.largest_adapter * 4 // ask.rank,
        )  # fmt: skip
        ways.append(f"--rank 4 ({smallest(share)})")
    return ways
