"""What a run minimises. `train_loop` knows nothing else of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from nybble.data.encoded_rows import supervised_of
from nybble.data.examples import EncodedExample
from nybble.data.packing import Batch
from nybble.layers.batch_model import BatchModel
from nybble.layers.causal_lm import CausalLM
from nybble.layers.loss_head import Denominator
from nybble.sources.task import TOKENS, Task

if TYPE_CHECKING:
    from nybble.data.prepare import PreparedData, RowKind
    from nybble.sources.stored_model import StoredModel


@dataclass(frozen=True)
class Totals:
    """What the micro-batches of one step, or of one evaluation, share: how it is cut into them changes nothing.

    Args:
        terms: of the sum that the loss is the mean of: supervised tokens, or pairs, or rows.
    """

    terms: Denominator


@dataclass(frozen=True)
class Part:
    """What a micro-batch adds to its step.

    Args:
        loss: a scalar in fp32, whose backward gives the adapters' gradients.
        metrics: fp64 `(M,)`, of the objective's metrics; None where it has none.
    """

    loss: Tensor
    metrics: Tensor | None = None


class Objective(Protocol):
    """What rows are learnt from, how they become a batch, and a batch a loss."""

    @property
    def capturable(self) -> bool:
        """Whether `loss` only asks the model for what its batch's tensors say, whatever is filled up in them
        (`nybble.data.packing.fill_up`): then a GPU may replay it for another batch in their place.
        """

    @property
    def kind(self) -> "RowKind":
        """Of the rows."""

    @property
    def task(self) -> Task:
        """Which head stands on the model."""

    @property
    def model(self) -> type[BatchModel]:
        """What computes the model from batches."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what is told of a step beside its loss."""

    @property
    def unit(self) -> str:
        """Of the loss, for people."""

    def settled(self, data: "PreparedData", source: "StoredModel", recorded: Task | None) -> "Objective":
        """The objective with what it must know of all rows.

        Args:
            recorded: the task of the run that is gone on with, or whose adapter is trained on.
        """

    def complete(self, rows: Sequence[EncodedExample], seed: int, max_seq_len: int) -> Sequence[EncodedExample]:
        """Rows with what each needs of the others, before the first step."""

    def collate(self, rows: Sequence[EncodedExample], model: Any) -> Batch:
        """One micro-batch, on the CPU, as the model takes it: rows side by side, or padded."""

    def totals(self, model: Any, rows: Sequence[EncodedExample], micro_batch_size: int) -> Totals:
        """What all rows of a step, or of an evaluation, come to; no more than so many are computed at once."""

    def loss(self, model: Any, batch: Batch, totals: Any) -> Part:
        """The batch's part of its step's loss, the sum of its terms / `totals.terms`, and of the metrics."""

    def terms(self, model: Any, batch: Batch, totals: Any) -> Tensor:
        """The terms of the sum in `loss`, and of others, `(1 + K, N)`, without a gradient: what evaluations add up."""

    def measured(self, means: Sequence[float]) -> dict[str, float]:
        """What an evaluation tells beside its loss, by name.

        Args:
            means: of the K others, over all rows' terms.
        """


class NextTokens:
    """What objectives have in common that learn from what comes next."""

    task: Task = TOKENS
    model: type[BatchModel] = CausalLM
    metrics: ClassVar[tuple[str, ...]] = ()

    def settled(self, data: "PreparedData", source: "StoredModel", recorded: Task | None) -> Self:
        """As `Objective` says: it needs nothing."""
        return self

    def complete(self, rows: Sequence[EncodedExample], seed: int, max_seq_len: int) -> Sequence[EncodedExample]:
        """As `Objective` says: they need nothing."""
        return rows

    def measured(self, means: Sequence[float]) -> dict[str, float]:
        """As `Objective` says: the metrics of steps."""
        return dict(zip(self.metrics, means, strict=True))


class SupervisedFineTuning(NextTokens):
    """The mean of −log p over supervised tokens, in nats; where the batch has weights, each term times its own."""

    unit = "nats per supervised token"

    @property
    def kind(self) -> "RowKind":
        """Examples to follow."""
        from nybble.data.prepare import EXAMPLE_ROWS  # brings all that reads examples; the check of a card has no rows

        return EXAMPLE_ROWS

    def settled(self, data: "PreparedData", source: "StoredModel", recorded: Task | None) -> "SupervisedFineTuning":
        """As `Objective` says: of a model that reads pictures, with what reads them."""
        if source.task.kind != "pictured":
            return self
        from nybble.layers.pictured_lm import reading  # as above: brings what reads pictures

        assert source.picture_reader is not None
        return PicturedFineTuning(source.task, reading(source.picture_reader))

    @property
    def capturable(self) -> bool:
        """As `Objective` says; what inherits from this with a loss of its own says so itself."""
        return type(self).loss is SupervisedFineTuning.loss

    def collate(self, rows: Sequence[EncodedExample], model: CausalLM) -> Batch:
        """As `Objective` says."""
        return model.collate(rows)

    def totals(self, model: CausalLM, rows: Sequence[EncodedExample], micro_batch_size: int) -> Totals:
        """Count the supervised tokens."""
        return Totals(int(supervised_of(rows).sum()))

    def loss(self, model: CausalLM, batch: Batch, totals: Totals) -> Part:
        """As `Objective` says."""
        return Part(model.loss(batch, totals.terms))

    @torch.no_grad()
    def terms(self, model: CausalLM, batch: Batch, totals: Totals) -> Tensor:
        """As `Objective` says."""
        return model.token_losses(batch)[None]


class PicturedFineTuning(SupervisedFineTuning):
    """The same loss of a model that reads pictures among its tokens.

    Args:
        task: with the towers that are adapted.
        model: with what reads its pictures.
    """

    capturable = False

    def __init__(self, task: Task, model: type[CausalLM]):
        self.task, self.model = task, model
