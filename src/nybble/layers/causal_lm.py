"""A causal language model as training and evaluation see it: batches in, losses, logits and hidden states out.

    model = CausalLM.of(transformers_model)          # four-bit or dense, adapters attached
    loss = model.loss(batch)                         # mean over the batch's supervised tokens, in nats
    loss.backward()                                  # gradients of the adapters

`CausalLM.of` takes the first way that agrees with the model's own forward and loss (`layers/probe.py`), and the
`Verdict` says which, and why.
"""

from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from nybble.data.packing import Batch
from nybble.errors import ModelError
from nybble.layers.backbone import (
    Backbone,
    FusedForward,
    KeptTensors,
    Layout,
    ModuleForward,
    Reason,
    Why,
    why_not_blocks,
)
from nybble.layers.batch_model import BatchModel, Verdict
from nybble.layers.convert import adapters_of
from nybble.layers.decoder_block import Keep
from nybble.layers.full_weights import trains_weights
from nybble.layers.log_probs import log_probs
from nybble.layers.loss_head import Denominator, Head, OwnHead, loss_head
from nybble.layers.probe import Difference, Probe
from nybble.layers.regularisers import Regularisers
from nybble.layers.rotary import length_of_change, rotate_rows_alone
from nybble.layers.streamed import BlockStore, attach_store

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
    """

    def __init__(self, module: "PreTrainedModel", backbone: Backbone, head: Head, verdict: Verdict):
        super().__init__(module, backbone, verdict)
        self.head = head

    @classmethod
    def of(
        cls,
        module: "PreTrainedModel",
        *,
        keep: Keep = "nothing",
        whole_blocks: int = 0,
        packing: bool = True,
        store: BlockStore | None = None,
        kept: KeptTensors | None = None,
    ) -> "CausalLM":
        """Through decoder blocks where they know the model and rows are packed, else through its modules.

        Args:
            module: loaded, and with its adapters, if it is to have any.
            keep: what a layer keeps for its backward pass; less takes less memory and more time.
            whole_blocks: but the last so many decoder blocks keep everything.
            packing: rows side by side are wanted. Where the model would mix them, they are padded all the same.
            store: of a streamed base's blocks.
            kept: takes what is kept for backward; memory does where it is None.

        Raises:
            ModelError: no way gives what the model's own forward and loss give; the message names what differs.
        """
        rotate_rows_alone(module)
        probe: Probe | None = None
        dropout = any(adapter.dropout for adapter in adapters_of(module).values())
        reason = why_not_blocks(module, packing=packing, dropout=dropout, full=trains_weights(module))
        if reason is None:
            forward = FusedForward(module, keep, store, kept, whole_blocks)
            fused = cls(module, forward, loss_head(module), Verdict("blocks", "packed"))
            if length_of_change(module) is None:  # what blocks know else, they know whatever the model's weights
                return fused
            if store is not None:
                attach_store(module, store)
            probe = Probe(module, store)
            difference = probe.difference(fused)
            if difference is None:
                return fused
            reason = Reason(Why.DIFFERENCE, difference.part)
        return _through_modules(module, keep, packing, reason, store, kept, probe)

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        return self.head.device

    # ---- batches ---------------------------------------------------------------------------------

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


def _through_modules(
    module: "PreTrainedModel",
    keep: Keep,
    packing: bool,
    reason: Reason,
    store: BlockStore | None,
    kept: KeptTensors | None,
    probe: Probe | None,
) -> CausalLM:
    """In the first layout that agrees with the model's own forward and loss."""
    head = loss_head(module)
    if store is not None:
        attach_store(module, store)
    probe = probe or Probe(module, store)
    refused: list[tuple[Layout, Difference]] = []
    for layout in get_args(Layout)[0 if packing else 1 :]:
        verdict = Verdict("generic", layout, isinstance(head, OwnHead), reason, tuple(refused))
        forward = ModuleForward(module, layout, checkpointing=keep != "everything", store=store, kept=kept)
        model = CausalLM(module, forward, head, verdict)
        found = probe.difference(model)
        if found is None:
            return model
        refused.append((layout, found))
    _, difference = refused[-1]
    raise ModelError(
        f"nybble cannot train {type(module).__name__} on its own loss: {difference.part} differs by "
        f"{difference.size:.1%} from its own forward's, also for a row alone.",
        "Allowed: models whose loss comes from their decoder's last states, token by token.",
        "Please report the model's type; other models of transformers, and --compute-dtype fp32, may work.",
    )
