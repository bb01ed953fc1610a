"""What it takes to ask a model about rows, once and without training it: a teacher, before a run's first step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch

from nybble.errors import ConfigError, PlanError
from nybble.formats.format import DEFAULT_FORMAT
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.layers.backbone import why_not_blocks
from nybble.planning.base_costs import mean_bits, streamed_bytes
from nybble.planning.costs import Part, predict
from nybble.planning.machine_table import Machine
from nybble.planning.planner import forward_seconds
from nybble.planning.request import MICRO_BATCH_TOKENS
from nybble.planning.run_shape import MicroBatches, RunShape
from nybble.planning.shape import shape_of
from nybble.planning.strategies import streamed_run
from nybble.sizes import rules_for
from nybble.sources.stored_model import StoredModel
from nybble.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOP_K = 64  # tokens of each distribution, where the user does not say
RECORD_BYTES = 24  # of a row beside what is said of it
BITS = {"none": "16 bits", "stored": "its own bits"}


@dataclass(frozen=True)
class AskedModel:
    """What is known of a model that will be asked.

    Args:
        skeleton: on the meta device.
        formats: few bits that its linear layers are in already, `in_four_bits` naming these layers; else None.
        streamable: its blocks can be read where they are used.
    """

    name: str
    skeleton: "PreTrainedModel"
    formats: BaseFormats | None
    in_four_bits: set[str] | None
    streamable: bool

    @classmethod
    def of(cls, source: StoredModel) -> "AskedModel":
        """As it is stored."""
        formats, in_four_bits = source.layer_formats, source.in_four_bits
        return cls(source.name, source.skeleton, formats, in_four_bits, source.is_streamable)


@dataclass(frozen=True)
class AskedPlan:
    """One way to ask.

    Args:
        format: what the model's linear layers are in: "none" for 16 bits, "stored" for few bits that they come in, else
            what they are put into.
        rows_at_once: most rows that are computed together.
        run: how it is done.
        components: bytes at the highest moment.
        budget_bytes: there are.
    """

    format: str
    rows_at_once: int
    run: RunShape
    components: dict[Part, int]
    budget_bytes: int

    @property
    def peak_bytes(self) -> int:
        """At the highest moment."""
        return sum(self.components.values())

    @property
    def fits(self) -> bool:
        """Whether that is within the budget."""
        return self.peak_bytes <= self.budget_bytes

    @property
    def resident_blocks(self) -> int | None:
        """Of a model that is streamed, else None."""
        return self.run.resident_blocks

    def too_large(self, name: str) -> PlanError:
        """That there is no room for it."""
        folder = f" Or put it into four bits (nybble quantize --model {name}): the folder's blocks are streamed."
        return PlanError(
            f"The smallest way to ask the teacher, {name}, takes {self.describe()}; the budget is "
            f"{format_bytes(self.budget_bytes)}.",
            "The teacher is in memory alone, before the student is.",
            "Raise --memory, lower --max-seq-len, or take a smaller teacher."
            + (folder if self.resident_blocks is None else ""),
        )

    def describe(self) -> str:
        """Say in a few words how."""
        words = [BITS.get(self.format, self.format)]
        words += [] if self.resident_blocks is None else [f"streamed, {self.resident_blocks} blocks resident"]
        return f"{', '.join(words)}, {format_bytes(self.peak_bytes)} at the highest moment"


@dataclass(frozen=True)
class Asking:
    """Asking a teacher about all rows of a run.

    Args:
        name: of the teacher.
        plan: how it is asked.
        tokens: that go through it.
        seconds: that takes, predicted.
        file_bytes: of what is kept of its answers.
    """

    name: str
    plan: AskedPlan
    tokens: int
    seconds: float
    file_bytes: int

    @classmethod
    def of(cls, name: str, plan: AskedPlan, machine: Machine, rows: int, tokens: int, targets: int, top_k: int) -> Self:
        """Rows of so many tokens together, of so many targets, of each of which the likeliest `top_k` are kept."""
        file_bytes = targets * distribution_bytes(top_k) + rows * RECORD_BYTES
        return cls(name, plan, tokens, forward_seconds(plan.run, machine, tokens), file_bytes)

    def describe(self) -> str:
        """Say in a sentence what it takes."""
        return (
            f"{self.name}: {self.plan.describe()}; {self.tokens} tokens forward, {self.seconds:.3g} s predicted; "
            f"{format_bytes(self.file_bytes)} on the disk"
        )

    def to_json(self) -> dict[str, Any]:
        """Its values; bytes and seconds."""
        plan = self.plan
        how = {"format": plan.format, "rows_at_once": plan.rows_at_once, "resident_blocks": plan.resident_blocks}
        size = {"peak_bytes": plan.peak_bytes, "fits": plan.fits, "components": plan.components}
        took = {"tokens": self.tokens, "seconds": round(self.seconds, 4), "file_bytes": self.file_bytes}
        return {"name": self.name} | how | size | took

    def check(self) -> None:
        """Refuse what does not fit.

        Raises:
            PlanError: it does not.
        """
        if not self.plan.fits:
            raise self.plan.too_large(self.name)


def distribution_bytes(top_k: int) -> int:
    """Of what is kept of one: ids in four bytes, log-probabilities in two, and that of all others."""
    return 6 * top_k + 2


def plan_asking(
    asked: AskedModel,
    format: str,
    batches: Callable[[int], MicroBatches],
    machine: Machine,
    dtype: torch.dtype,
    *,
    packing: bool,
) -> AskedPlan:
    """The first way that fits: all of the model in memory as it is stored; its blocks read from their folder; its
    linear layers put into four bits; each with fewer and fewer rows at once. The smallest where none does.

    Args:
        format: "auto", or the only one that may be taken.
        batches: most rows at once -> what micro-batches come to.
        packing: rows lie side by side.

    Raises:
        ConfigError: the model has no such format.
    """
    tried = []
    for chosen, run in _ways(asked, format, batches(1), machine, dtype, packing):
        size = max(1, MICRO_BATCH_TOKENS // batches(1).longest_row)
        while size:
            tried.append(_plan(chosen, size, replace(run, batches=batches(size)), machine))
            if tried[-1].fits:
                return tried[-1]
            size //= 2
    if not tried:
        raise ConfigError(
            f"teacher-format is {format}, and {asked.name} is in {'16' if asked.formats is None else 'few'} bits.",
            f"stored: few bits that a model comes in; none, {DEFAULT_FORMAT}: of one in 16 bits.",
            "Leave --teacher-format out.",
        )
    return min(tried, key=lambda plan: plan.peak_bytes)


def _plan(format: str, size: int, run: RunShape, machine: Machine) -> AskedPlan:
    if run.resident_blocks is not None:
        run = streamed_run(run, machine)
    return AskedPlan(format, size, run, {Part.PROCESS: machine.begun_bytes} | predict(run), machine.budget_bytes)


def _ways(
    asked: AskedModel, format: str, batches: MicroBatches, machine: Machine, dtype: torch.dtype, packing: bool
) -> Iterator[tuple[str, RunShape]]:
    """Formats, and what is done with the model in them, the best first."""
    own = "none" if asked.formats is None else "stored"
    if format in ("auto", own):
        run = _shape(asked, asked.formats, batches, machine, dtype, packing)
        yield own, run
        if asked.streamable and machine.has_lane:
            none = replace(run, resident_blocks=0)
            yield own, replace(none, from_ram=not machine.on_cpu and streamed_bytes(none) <= machine.host_bytes)
    if asked.formats is None and format in ("auto", DEFAULT_FORMAT):
        formats = BaseFormats(QuantSpec(DEFAULT_FORMAT))
        yield DEFAULT_FORMAT, _shape(asked, formats, batches, machine, dtype, packing)


def _shape(
    asked: AskedModel,
    formats: BaseFormats | None,
    batches: MicroBatches,
    machine: Machine,
    dtype: torch.dtype,
    packing: bool,
) -> RunShape:
    model = shape_of(asked.skeleton, asked.in_four_bits)
    device = torch.device(machine.kind)
    against = why_not_blocks(asked.skeleton, packing=packing, dropout=False, device=device, here=machine.here)
    average, most = mean_bits(model, formats) if formats is not None and formats.layers else (None, None)
    return RunShape(
        model,
        batches=batches,
        adapter_parameters=0,
        rank=0,
        compute_bytes=dtype.itemsize,
        spec=None if formats is None else formats.spec,
        average_bits=average,
        most_bits=most,
        path="blocks" if against is None else "generic",
        keep="nothing",
        rules=rules_for(machine.kind, dtype.itemsize),
        product_bytes=machine.product_bytes,
        on_cpu=machine.on_cpu,
        asked=True,
    )
