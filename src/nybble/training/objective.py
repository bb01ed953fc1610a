"""What a run minimises. `train_loop` knows nothing else of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from nybble.data import packing
from nybble.data.encoded_rows import supervised_of
from nybble.data.examples import EncodedExample
from nybble.data.packing import Batch
from nybble.layers.causal_lm import CausalLM
from nybble.layers.loss_head import Denominator

if TYPE_CHECKING:
    from nybble.data.prepare import RowKind


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
    def metrics(self) -> tuple[str, ...]:
        """Names of what is told of a step beside its loss."""

    @property
    def unit(self) -> str:
        """Of the loss, for people."""

    def complete(self, rows: Sequence[EncodedExample], seed: int, max_seq_len: int) -> Sequence[EncodedExample]:
        """Rows with what each needs of the others, before the first step."""

    def collate(self, rows: Sequence[EncodedExample], model: CausalLM) -> Batch:
        """One micro-batch, on the CPU, as the model takes it: rows side by side, or padded."""

    def totals(self, model: CausalLM, rows: Sequence[EncodedExample], micro_batch_size: int) -> Totals:
        """What all rows of a step, or of an evaluation, come to; no more than so many are computed at once."""

    def loss(self, model: CausalLM, batch: Batch, totals: Any) -> Part:
        """The batch's part of its step's loss, the sum of its terms / `totals.terms`, and of the metrics."""

    def terms(self, model: CausalLM, batch: Batch, totals: Any) -> Tensor:
        """The terms of the sum in `loss`, and of those of the metrics, `(1 + M, N)`, without a gradient: what
        evaluations add up.
        """


class SupervisedFineTuning:
    """The mean of −log p over supervised tokens, in nats; where the batch has weights, each term times its own."""

    metrics: tuple[str, ...] = ()
    unit = "nats per supervised token"

    @property
    def kind(self) -> "RowKind":
        """Examples to follow."""
        from nybble.data.prepare import EXAMPLE_ROWS  # brings all that reads examples; the check of a card has no rows

        return EXAMPLE_ROWS

    @property
    def capturable(self) -> bool:
        """As `Objective` says; what inherits from this with a loss of its own says so itself."""
        return type(self).loss is SupervisedFineTuning.loss

    def complete(self, rows: Sequence[EncodedExample], seed: int, max_seq_len: int) -> Sequence[EncodedExample]:
        """As `Objective` says: they need nothing."""
        return rows

    def collate(self, rows: Sequence[EncodedExample], model: CausalLM) -> Batch:
        """As `Objective` says."""
        return packing.collate(rows, model.packed)

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
