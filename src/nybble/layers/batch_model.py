"""What a causal language model and one that scores texts have in common, as training sees them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor, nn

from nybble.data.packing import Batch
from nybble.errors import ModelError
from nybble.layers.backbone import Backbone, FusedForward, KeptTensors, Layout, Reason
from nybble.layers.convert import trained_parameters
from nybble.layers.decoder_block import Keep
from nybble.layers.probe import Difference
from nybble.layers.regularisers import Regularisers
from nybble.layers.streamed import BlockStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Path = Literal["blocks", "generic"]


@dataclass(frozen=True)
class Verdict:
    """Which way through a model gives the model's own loss and gradients.

    Args:
        path: nybble's decoder blocks, or transformers' own modules.
        layout: of the rows of a micro-batch.
        own_head: the logits come from the model's own forward, not from a linear head.
        reason: why not decoder blocks.
        layouts_refused: those that were tried before, and what differed in them.
    """

    path: Path
    layout: Layout
    own_head: bool = False
    reason: Reason | None = None
    layouts_refused: tuple[tuple[Layout, Difference], ...] = ()

    def describe(self) -> str:
        """Say which path runs, and why."""
        if self.path == "blocks":
            return "decoder blocks"
        parts = [f"generic path ({self.reason})"]
        if self.layouts_refused:
            differs = dict(self.layouts_refused)[self.layouts_refused[0][0]].part
            how = "rows are padded" if self.layout == "padded" else "rows go through one at a time"
            together = " and ".join(layout for layout, _ in self.layouts_refused)
            parts.append(f"{how}, since {together} ones differ from the model's own forward in {differs}")
        if self.own_head:
            parts.append("logits by the model's own head")
        return "; ".join(parts)


class BatchModel:
    """A model of transformers, its weights frozen and its adapters trained, that is given batches.

    Batches are on the model's device (`batch.to(model.device)`), packed where `packed` says so, else padded
    (`nybble.data.packing.collate`).

    Args:
        module: the transformers model. Adapters attached later are not seen: make another of it then.
        backbone: from tokens to final hidden states.
        verdict: which way that is, and why.
    """

    def __init__(self, module: "PreTrainedModel", backbone: Backbone, verdict: Verdict):
        self.module, self.backbone, self.verdict = module, backbone, verdict

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
    ) -> Self:
        """The way through the model that agrees with its own forward.

        Args:
            module: loaded, and with its adapters, if it is to have any.
            keep: what a layer keeps for its backward pass; less takes less memory and more time.
            whole_blocks: but the last so many decoder blocks keep everything.
            packing: rows side by side are wanted. Where the model would mix them, they are padded all the same.
            store: of a streamed base's blocks.
            kept: takes what is kept for backward; memory does where it is None.

        Raises:
            ModelError: no way gives what the model's own forward gives; the message names what differs.
        """
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        return next(self.module.parameters()).device

    @property
    def name(self) -> str:
        """Say which path runs, and why."""
        return self.verdict.describe() + self.backbone.details

    @property
    def packed(self) -> bool:
        """Whether rows lie side by side in its batches, else padded."""
        return self.backbone.layout == "packed"

    @property
    def shares(self) -> bool:
        """Whether documents of its batches may share a beginning (`packing.share_beginnings`)."""
        return isinstance(self.backbone, FusedForward)

    # ---- batches ---------------------------------------------------------------------------------

    def hidden(self, batch: Batch, positions: Tensor | None = None) -> Tensor:
        """The final hidden states, which the head reads.

        Args:
            positions: int64 `(N,)`, indices into the flattened B * T positions; the supervised ones where None.

        Returns:
            `(N, hidden)` in the compute dtype.

        Raises:
            ModelError: the batch's layout is not the model's.
        """
        self._check_layout(batch)
        return self.backbone.hidden(batch, batch.supervised_positions if positions is None else positions)

    def _check_layout(self, batch: Batch) -> None:
        """One document alone is the same packed or not; decoder blocks want it packed."""
        assert batch.spread is None or self.shares, "documents that share a beginning, and a model that mixes them"
        if batch.packed == self.packed or (batch.packed and len(batch.document_lengths) == 1):
            return
        raise ModelError(
            f"A {'packed' if batch.packed else 'padded'} batch of {len(batch.document_lengths)} documents.",
            f"This model takes {'packed' if self.packed else 'padded'} ones ({self.name}).",
            "Make batches as the model's `packed` says.",
        )

    def regularise(self, regularisers: Regularisers) -> None:
        """From now on these are part of a training step."""
        self.backbone.regularisers = regularisers

    # ---- as an nn.Module has it ------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """What is trained: A and B of every adapter."""
        return trained_parameters(self.module)

    @property
    def training(self) -> bool:
        """Whether dropout is on."""
        return self.module.training

    def train(self, mode: bool = True) -> Self:
        """Switch dropout on, or off with `mode` False."""
        self.module.train(mode)
        return self

    def eval(self) -> Self:
        """Switch dropout off."""
        return self.train(False)
