"""A causal language model as training and evaluation see it: batches in, losses, logits and hidden states out.

    model = CausalLM.of(transformers_model)          # four-bit or dense, adapters attached
    loss = model.loss(batch)                         # mean over the batch's supervised tokens, in nats
    loss.backward()                                  # gradients of the adapters

`CausalLM.of` takes the first way that agrees with the model's own forward and loss (`layers/probe.py`), and the
`Verdict` says which, and why.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from nybble.data.examples import EncodedExample
from nybble.data.packing import Batch, collate
from nybble.errors import ModelError
from nybble.layers.backbone import Backbone
from nybble.layers.batch_model import BatchModel, Verdict
from nybble.layers.log_probs import log_probs
from nybble.layers.loss_head import Denominator, Head
from nybble.layers.own_head import OwnHead, loss_head
from nybble.layers.probe import Difference
from nybble.layers.regularisers import Regularisers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CausalLM(BatchModel):
    """A model of transformers, its adapters trained and its weights frozen, or its weights trained, computed from batch
    to loss.

    Batches are on the model's device (`batch.to(model.device)`), packed where `packed` says so, else padded
    (`nybble.data.packing.collate`).

    Args:
        module: the transformers model. Adapters attached later are not seen: make another `CausalLM` of it then.
        backbone: from tokens to final hidden states.
        head: from these to logits and losses.
        verdict: which way that is, and why.

    Attributes:
        trainable: which models are, for a refusal.
    """

    trainable: ClassVar[str] = "models whose loss comes from their decoder's last states, token by token"

    def __init__(self, module: "PreTrainedModel", backbone: Backbone, head: Head, verdict: Verdict):
        super().__init__(module, backbone, verdict)
        self.head = head

    @classmethod
    def _head_of(cls, module: "PreTrainedModel") -> Head:
        return loss_head(module)

    @classmethod
    def _is_own(cls, head: Head) -> bool:
        return isinstance(head, OwnHead)

    @classmethod
    def _through(cls, module: "PreTrainedModel", backbone: Backbone, head: Head, verdict: Verdict) -> Self:
        return cls(module, backbone, head, verdict)

    @classmethod
    def _refused(cls, module: "PreTrainedModel", difference: Difference) -> ModelError:
        return ModelError(
            f"nybble cannot train {type(module).__name__} on its own loss: {difference.part} differs by "
            f"{difference.size:.1%} from its own forward's, also for a row alone.",
            f"Allowed: {cls.trainable}.",
            "Please report the model's type; other models of transformers, and --compute-dtype fp32, may work.",
        )

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        return self.head.device

    # ---- batches ---------------------------------------------------------------------------------

    def collate(self, rows: Sequence[EncodedExample]) -> Batch:
        """One micro-batch of the rows, on the CPU, as the model takes it."""
        return collate(rows, self.packed)

    def beside(self, row: EncodedExample) -> dict[str, Tensor]:
        """What the model is given of a row beside its tokens, by name, on the CPU: of its pictures, if it has any; an
        encoder-decoder its answer.
        """
        return {}

    def loss(self, batch: Batch, denominator: Denominator | None = None) -> Tensor:
        """Σ weight · (−log p(target)) over the batch's targets, divided by `denominator`.

        Args:
            batch: packed or padded, as `packed` says.
            denominator: supervised tokens of the whole step, where the batch is part of one; its own where None.

        Returns:
            A scalar in fp32, in nats, whose backward gives the gradients of the adapters. The logits are never held all
            at once.

        Raises:
            ModelError: the batch's layout is not the model's, or a target lies outside its vocabulary.
        """
        denominator = max(1, batch.supervised_tokens) if denominator is None else denominator
        self.check_targets(batch)
        return self.head.loss(self.hidden(batch), batch.supervised_targets, denominator, batch.supervised_weights)

    def log_probs(self, batch: Batch) -> Tensor:
        """log p of each target in nats, with its gradient: what losses are made of that are no sum over tokens.

        Returns:
            fp32 `(N,)`, in the order of `batch.supervised_positions`; weights have no part in it. The logits are never
            held all at once.

        Raises:
            ModelError: the batch's layout is not the model's, or a target lies outside its vocabulary.
        """
        self.check_targets(batch)
        return log_probs(self.head, self.hidden(batch), batch.supervised_targets)

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> Tensor:
        """What each target adds to the sum in `loss`: weight · (−log p(target)) in nats, without a gradient.

        Returns:
            fp32 `(N,)`, in the order of `batch.supervised_positions`.

        Raises:
            ModelError: the batch's layout is not the model's, or a target lies outside its vocabulary.
        """
        self.check_targets(batch)
        return self.head.token_losses(self.hidden(batch), batch.supervised_targets, batch.supervised_weights)

    @torch.no_grad()
    def logits(self, batch: Batch, positions: Tensor | None = None) -> Tensor:
        """What the model says after each of the tokens at `positions`, which `hidden` describes; no gradient.

        Returns:
            `(N, vocabulary)`, all of them at once, in the compute dtype or in fp32.

        Raises:
            ModelError: the batch's layout is not the model's.
        """
        return self.head.logits(self.hidden(batch, positions))

    def check_targets(self, batch: Batch) -> None:
        """Here, where they are known: kernels on a GPU would have to wait, and trust them.

        Raises:
            ModelError: a target lies outside the model's vocabulary.
        """
        if batch.largest_target >= self.head.vocabulary:
            raise ModelError(
                f"A target is {batch.largest_target}.",
                f"The model's vocabulary ends at {self.head.vocabulary - 1}.",
                "Make batches with the tokenizer of the model.",
            )

    def regularise(self, regularisers: Regularisers) -> None:
        """From now on these are part of a training step: of `loss`, and of `hidden` while the model trains."""
        super().regularise(regularisers)
        self.head = self.head.with_regularisers(regularisers)
