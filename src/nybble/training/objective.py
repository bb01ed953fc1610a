"""What a run minimises. `train_loop` knows nothing else of it."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from nybble.data import packing
from nybble.data.examples import EncodedExample, Example
from nybble.data.packing import Batch
from nybble.data.template import ChatTemplate
from nybble.layers.causal_lm import CausalLM
from nybble.layers.loss_head import Denominator


class Objective(Protocol):
    """How an example becomes rows, rows a batch, and a batch a loss."""

    @property
    def capturable(self) -> bool:
        """Whether `loss` only asks the model for what its batch's tensors say, whatever is filled up in them
        (`nybble.data.packing.fill_up`): then a GPU may replay it for another batch in their place.
        """

    def encode(self, template: ChatTemplate, example: Example) -> list[EncodedExample]:
        """The training sequences of an example, untruncated.

        Raises:
            RowError: it cannot be trained on; its `finding` says why.
        """

    def collate(self, rows: Sequence[EncodedExample], packed: bool) -> Batch:
        """One micro-batch, on the CPU: rows side by side, or padded."""

    def tokens(self, batch: Batch) -> int:
        """What the batch adds to the denominator of its step's loss, and of an evaluation's."""

    def loss(self, model: CausalLM, batch: Batch, denominator: Denominator) -> Tensor:
        """The batch's part of its step's loss: a scalar in fp32, whose backward gives the adapters' gradients.

        Args:
            denominator: `tokens` of all batches of the step: how it is cut into batches changes nothing.
        """

    def token_losses(self, model: CausalLM, batch: Batch) -> Tensor:
        """The terms of the sum in `loss`, fp32 `(N,)`, without a gradient: what evaluations add up."""


class SupervisedFineTuning:
    """The mean of −log p over supervised tokens, in nats; where the batch has weights, each term times its own."""

    @property
    def capturable(self) -> bool:
        """As `Objective` says; what inherits from this with a loss of its own says so itself."""
        return type(self).loss is SupervisedFineTuning.loss

    def encode(self, template: ChatTemplate, example: Example) -> list[EncodedExample]:
        """Encode an example; what is learnt is what the template marks as the assistant's."""
        return template.encode_example(example)

    def collate(self, rows: Sequence[EncodedExample], packed: bool) -> Batch:
        """As `Objective` says."""
        return packing.collate(rows, packed)

    def tokens(self, batch: Batch) -> int:
        """Count the supervised tokens."""
        return batch.supervised_tokens

    def loss(self, model: CausalLM, batch: Batch, denominator: Denominator) -> Tensor:
        """As `Objective` says."""
        return model.loss(batch, denominator)

    def token_losses(self, model: CausalLM, batch: Batch) -> Tensor:
        """As `Objective` says."""
        return model.token_losses(batch)
