"""What a run could do to fit: every strategy, micro-batch and choice of what blocks keep; the fastest that fits.

Bytes come from `costs.predict`. Seconds are the products at the machine's speed, dequantisation and the optimizer at
that of its memory, a constant for each block entered, and reading where it takes longer than what it hides behind. On a
GPU also what other kernels move, and the constant, which its host spends beside it, counts only where it is longer, and
not at all where micro-batches come from graphs: so they do wherever there is memory for that.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nybble.errors import PlanError
from nybble.planning.base_costs import end_bytes, resident_bytes, streamed_bytes
from nybble.planning.block_costs import offloaded_bytes
from nybble.planning.costs import Part, predict
from nybble.planning.machine_table import Machine
from nybble.planning.run_shape import MicroBatches, RunShape
from nybble.planning.strategies import WAYS, Cause, PlanRequest, Reason, Strategy, method_of
from nybble.planning.work import Work, forward_work, work_of
from nybble.sizes import PAGE_BUFFERS

if TYPE_CHECKING:
    from nybble.layers.decoder_block import Keep
    from nybble.options.method_groups import Method

# A block's small kernels and their calls, forward or backward; on a GPU the calls alone: some 20 of 25 us, assumed.
BLOCK_S = {"cpu": 5e-3, "cuda": 5e-4}
RECORDED = (
    *("strategy", "micro_batch_size", "keep", "resident_blocks"),
    *("stream_ends", "paged", "offloaded", "peak_bytes"),
)  # of a plan, in `plan.json`
STREAMING_OVERHEAD = 1.03  # of a step; where two plans take as long, the simpler one is chosen


@dataclass(frozen=True)
class Plan:
    """One way to run, and what it should cost.

    Args:
        micro_batch_size: rows at once.
        run: how it is done.
        components: bytes at the highest moment; they add up to `peak_bytes`.
        step_s: seconds an optimizer step.
        excluded: why this run may not take it, whatever it needs; None where it may.
        too_large: why it does not fit; None where it does.
    """

    strategy: Strategy
    micro_batch_size: int
    run: RunShape
    components: dict[Part, int]
    step_s: float
    excluded: Reason | None
    too_large: Reason | None

    @property
    def keep(self) -> "Keep":
        """What each block keeps for its backward pass."""
        return self.run.keep

    @property
    def whole_blocks(self) -> int:
        """Of the others, the last so many keep everything."""
        return self.run.whole_blocks

    @property
    def batches(self) -> MicroBatches:
        """What its micro-batches come to."""
        return self.run.batches

    @property
    def resident_blocks(self) -> int | None:
        """Of a streamed base, else None."""
        return self.run.resident_blocks

    @property
    def stream_ends(self) -> bool:
        """Whether embedding and head are read where they are used."""
        return self.run.stream_ends

    @property
    def paged(self) -> bool:
        """Whether the optimizer's state is in a file."""
        return self.run.page_bytes is not None

    @property
    def offloaded(self) -> bool:
        """Whether what blocks keep goes to a file, or beside a GPU."""
        return self.run.offload

    @property
    def offloaded_bytes(self) -> int:
        """What that comes to; 0 where they keep it in the memory planned."""
        return offloaded_bytes(self.run)

    @property
    def why_not(self) -> Reason | None:
        """None where it may be chosen."""
        return self.excluded or self.too_large

    @property
    def way(self) -> str:
        """What opens a plan that would fit and may not be taken as things are; empty where nothing does."""
        return self.excluded.way if self.excluded is not None and self.too_large is None else ""

    @property
    def left_to_method(self) -> bool:
        """Whether nothing but --method speaks against it."""
        return self.excluded is None or self.excluded.way == f"--method {method_of(self.strategy)}"

    @property
    def peak_bytes(self) -> int:
        return sum(self.components.values())

    def describe(self) -> str:
        """Say in a few words what is chosen."""
        rows = "row" if self.micro_batch_size == 1 else "rows"
        words = [self.strategy, f"{self.micro_batch_size} {rows} at once", f"blocks keep {self.keep}"]
        words += [f"the last {self.whole_blocks} everything"] if self.whole_blocks else []
        words += ["offloaded"] if self.offloaded else []
        words += ["from graphs"] if self.run.graphs else []
        if self.resident_blocks is not None:
            words.append(f"{self.resident_blocks} blocks resident")
            words += ["embedding and head streamed"] if self.stream_ends else []
            words += ["optimizer paged"] if self.paged else []
        return ", ".join(words)

    def flags(self) -> str:
        """The options that ask for this plan."""
        words = [f"--micro-batch-size {self.micro_batch_size}", f"--keep {self.keep}"]
        words += [f"--whole-blocks {self.whole_blocks}"] if self.whole_blocks else []
        words += [] if self.resident_blocks is None else ["--stream-base always"]
        words += ["--offload-activations always"] if self.offloaded else []
        return " ".join(words + (["--page-optimizer always"] if self.paged else []))

    def to_json(self, reason: Reason | None = None) -> dict[str, Any]:
        """Its values, and why it was not chosen."""
        record = {name: getattr(self, name) for name in RECORDED}
        record |= {"whole_blocks": self.whole_blocks} if self.whole_blocks else {}
        record |= {"step_s": round(self.step_s, 4), "components": self.components}
        if reason is not None:
            record |= {"why_not": reason.sentence, "cause": reason.cause}
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
        allowed = [plan for plan in self.candidates if plan.excluded is None]
        return min(allowed or self.candidates, key=lambda plan: plan.peak_bytes)

    @property
    def rejected(self) -> tuple[Plan, ...]:
        """The best of each strategy that was not chosen."""
        return tuple(plan for plan in self.best if self.chosen is None or plan.strategy != self.chosen.strategy)

    def reason(self, plan: Plan) -> Reason:
        """Why this one was not chosen."""
        if plan.excluded is not None and plan.too_large is not None:
            return replace(plan.excluded, sentence=f"{plan.excluded.sentence}, and {plan.too_large.sentence}")
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


def best_of_method(plans: Plans, method: "Method") -> Plan:
    """Of a method's ways the fastest that fits and that nothing but --method speaks against, else the smallest."""
    own = [plan for plan in plans.candidates if method_of(plan.strategy) == method]
    fitting = [plan for plan in own if plan.too_large is None and plan.left_to_method]
    return min(fitting, key=lambda plan: plan.step_s) if fitting else min(own, key=lambda plan: plan.peak_bytes)


def first_that_fits(plans: Plans, methods: "Sequence[Method]", memory: int | None) -> "tuple[Method, str]":
    """What --method auto takes: the first of `methods` that fits, the last where none does; and why.

    Args:
        plans: for any method.
        memory: what the user gave. Full fine-tuning is not chosen without: it takes several times what others do.
    """
    budget = f"{plans.machine.budget_bytes / 1e9:.2f} GB"
    passed: list[str] = []
    for method in methods:
        found = best_of_method(plans, method)
        size = f"{found.peak_bytes / 1e9:.2f} GB"
        if method == "full" and memory is None:
            passed.append(f"full takes {size} and is chosen with --memory alone")
        elif found.why_not is None:
            return method, "; ".join([f"{size} fit into {budget}", *passed])
        else:
            passed.append(f"{method}: {plans.reason(found).sentence}")
    return methods[-1], "; ".join([f"nothing fits into {budget}", *passed])


def make_plans(request: PlanRequest, machine: Machine) -> Plans:
    """Every plan there is for `request`, the choice among them, and the best of each strategy."""
    candidates = tuple(_candidates(request, machine))
    fitting = [plan for plan in candidates if not plan.why_not]
    # Within one strategy seconds decide; memory that would be left over costs nothing.
    chosen = min(fitting, key=lambda plan: (plan.step_s, plan.peak_bytes), default=None)
    best = []
    for strategy in Strategy:
        plans = [plan for plan in candidates if plan.strategy is strategy]
        within = [plan for plan in plans if plan.peak_bytes <= machine.budget_bytes]
        if within:
            best.append(min(within, key=lambda plan: (plan.step_s, plan.peak_bytes)))
        elif plans:
            best.append(min(plans, key=lambda plan: plan.peak_bytes))
    return Plans(machine, chosen, tuple(best), candidates)


def _candidates(request: PlanRequest, machine: Machine) -> Iterable[Plan]:
    for strategy in Strategy:
        for size, batches in request.batches.items():
            micro_batches = -(-request.rows_per_step // size)
            for keep in request.keeps:
                run = replace(request.run, batches=batches, micro_batches=micro_batches, keep=keep)
                for way in WAYS[strategy](request, run, machine):
                    yield _plan(request, machine, strategy, size, way)


def _plan(request: PlanRequest, machine: Machine, strategy: Strategy, size: int, run: RunShape) -> Plan:
    components = {Part.PROCESS: machine.begun_bytes} | predict(run)
    if run.filled_up:
        graphed = replace(run, graphs=True)
        with_graphs = components | predict(graphed)
        if sum(with_graphs.values()) <= machine.budget_bytes:
            run, components = graphed, with_graphs
    too_large = _too_large(run, machine, sum(components.values()))
    excluded = request.excluded.get(strategy)
    return Plan(strategy, size, run, components, _step_seconds(run, machine), excluded, too_large)


def _step_seconds(run: RunShape, machine: Machine) -> float:
    """Seconds an optimizer step: every micro-batch as the largest, unless padding says how much less; the update."""
    work = work_of(run)
    compute = (
        _compute_seconds(run, work, machine, run.batches.share) + 2 * offloaded_bytes(run) / machine.link_bytes_per_s
    )
    trained = run.learnt_parameters
    paging = 0 if run.page_bytes is None else 16 * trained / machine.link_bytes_per_s
    update = 28 * trained / machine.ram_bytes_per_s + paging
    micro_batch = compute
    if run.resident_blocks is not None:
        speed = machine.link_bytes_per_s if run.from_ram else machine.disk_bytes_per_s
        micro_batch = STREAMING_OVERHEAD * max(compute, work.read_bytes / speed)
    return run.micro_batches * micro_batch + update


def forward_seconds(run: RunShape, machine: Machine, num_tokens: int) -> float:
    """Of a pass without a gradient over so many tokens, in micro-batches such as the run's."""
    work = forward_work(run)
    seconds = _compute_seconds(run, work, machine)
    if run.resident_blocks is not None:
        speed = machine.link_bytes_per_s if run.from_ram else machine.disk_bytes_per_s
        seconds = STREAMING_OVERHEAD * max(seconds, work.read_bytes / speed)
    return seconds * num_tokens / run.batches.tokens


def _compute_seconds(run: RunShape, work: Work, machine: Machine, share: float = 1.0) -> float:
    """Of a micro-batch that has this share of the largest's tokens: what is computed, and moved within the memory that
    it is computed in.
    """
    attention = sum(flops / share for flops, share in zip(work.attention, machine.attention, strict=True))
    products = share * (work.flops + attention) / machine.flops
    calls = 0 if run.graphs else work.block_passes * BLOCK_S[machine.kind]
    if machine.on_cpu:
        return products + 2 * work.weight_bytes / machine.ram_bytes_per_s + calls
    return max(products + share * work.moved_bytes / (2 * machine.ram_bytes_per_s), calls)


def _too_large(run: RunShape, machine: Machine, peak_bytes: int) -> Reason | None:
    if (excess := peak_bytes - machine.budget_bytes) > 0:
        return Reason(Cause.BUDGET, f"needs {peak_bytes / 1e9:.2f} GB, {excess / 1e9:.2f} GB too many")
    beside = _bytes_beside(run)
    if beside > machine.host_bytes:
        there = f"there are {machine.host_bytes / 1e9:.2f} GB"
        return Reason(Cause.BESIDE, f"needs {beside / 1e9:.2f} GB of memory beside the budget; {there}")
    return None


def _bytes_beside(run: RunShape) -> int:
    """What a run needs of the host's memory: blocks and ends that are streamed from there; what a GPU offloads, and the
    pinned memory that its blocks from disk and its optimizer's pages pass through.
    """
    ends = end_bytes(run.model) if run.stream_ends else 0
    beside = streamed_bytes(run) + ends if run.from_ram else 0
    if run.on_cpu:
        return beside
    from_disk = run.resident_blocks is not None and not run.from_ram
    block = resident_bytes(run.model, run.spec, run.block_bits, run.compute_bytes, 1) if from_disk else 0
    page = (run.page_bytes or 0) // PAGE_BUFFERS
    return beside + offloaded_bytes(run) + block + page


_ON_A_GPU_HERE = " A fifth of a GPU's free memory is left, unless --memory asks for it. Or use --device cpu."


def require(plans: Plans, request: PlanRequest, unconstrained: PlanRequest | None) -> Plan:
    """The chosen plan.

    Args:
        unconstrained: the same run with every choice left to the planner, where the user fixed some.

    Raises:
        PlanError: nothing fits; the message names what would, with the options or commands that ask for it, else the
            smallest plan and what would change it.
    """
    if plans.chosen is not None:
        return plans.chosen
    smallest, machine = plans.smallest, plans.machine
    got = (
        f"The smallest plan takes {smallest.peak_bytes / 1e9:.2f} GB ({smallest.describe()}); "
        f"the budget is {machine.budget_bytes / 1e9:.2f} GB.{_held_by_others(machine)}"
    )
    instead = "" if machine.on_cpu or not machine.here else _ON_A_GPU_HERE
    if smallest.excluded is not None:
        got = f"No strategy is left. Not {smallest.strategy}: {plans.reason(smallest).sentence}."
    elsewise = make_plans(unconstrained, machine) if unconstrained is not None else plans
    if elsewise.chosen is not None:
        folders = [plan.way for plan in plans.openings if plan.excluded and plan.excluded.cause is Cause.NEEDS_FOLDER]
        as_they_are = f" As they are, they need a 4-bit folder: {folders[0]}." if folders else ""
        raise PlanError(
            got,
            f"What fits: {elsewise.chosen.describe()}, with {elsewise.chosen.peak_bytes / 1e9:.2f} GB.",
            f"Leave these options to nybble, or take {elsewise.chosen.flags()}.{as_they_are}{instead}",
        )
    openings = plans.openings or elsewise.openings
    if openings:
        described = [f"{plan.describe()}, with {plan.peak_bytes / 1e9:.2f} GB" for plan in openings]
        fixed = "" if plans.openings else " Leave the other options to nybble."
        ways = "; or ".join(plan.way for plan in openings)
        raise PlanError(got, f"What would fit: {'; or '.join(described)}.", f"Way out: {ways}.{fixed}{instead}")
    change = f"What would change it: {'; '.join(_ways_down(request, machine))}."
    raise PlanError(got, _largest_parts(smallest), change + instead)


def _held_by_others(machine: Machine) -> str:
    if not machine.others_bytes:
        return ""
    held = f"{machine.others_bytes / 1e9:.2f} GB"
    return f" Other programs hold {held} of the GPU (nvidia-smi lists them; CUDA_VISIBLE_DEVICES chooses another)."


def _largest_parts(plan: Plan) -> str:
    parts = sorted(plan.components.items(), key=lambda part: -part[1])[:4]
    return "Its largest parts: " + ", ".join(f"{name} {num_bytes / 1e9:.2f} GB" for name, num_bytes in parts) + "."


def _ways_down(request: PlanRequest, machine: Machine) -> list[str]:
    """Changes of what is asked, each with the smallest plan's bytes after it."""

    def smallest(changed: PlanRequest) -> str:
        return f"{make_plans(changed, machine).smallest.peak_bytes / 1e9:.2f} GB"

    shorter = {size: batches.halved() for size, batches in request.batches.items()}
    longest = max(batches.longest_row for batches in shorter.values())
    ways = [f"--max-seq-len {longest} ({smallest(replace(request, batches=shorter))})"]
    rank, adapters, largest = request.run.rank, request.run.adapter_parameters, request.largest_adapter
    if rank > 4:
        run = replace(request.run, rank=4, other_ranks=(), adapter_parameters=adapters * 4 // rank)
        largest = max(largest * 4 // rank, run.largest_trained)
        ways.append(f"--rank 4 ({smallest(replace(request, run=run, largest_adapter=largest))})")
    return ways
