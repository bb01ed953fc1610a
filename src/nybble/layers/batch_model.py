"""What a causal language model and one that scores texts have in common, as training sees them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn

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
from nybble.layers.convert import adapters_of, trained_parameters
from nybble.layers.decoder_block import Keep
from nybble.layers.full_weights import trains_weights
from nybble.layers.mixers import compute_mixers, restore_mixers
from nybble.layers.probe import Difference, Probe
from nybble.layers.regularisers import Regularisers
from nybble.layers.rotary import length_of_change, rotate_rows_alone
from nybble.layers.streamed import BlockStore, attach_store

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

    Attributes:
        probe: asks whether a way agrees with the model's own forward.
    """

    probe: ClassVar[type[Probe]] = Probe

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
        """The first way through the model that agrees with its own forward: decoder blocks where they know it and rows
        are packed, else its modules, in the first layout of rows that does.

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
        rotate_rows_alone(module)
        restore_mixers(module)
        head = cls._head_of(module)
        probe: Probe | None = None
        dropout = any(adapter.dropout for adapter in adapters_of(module).values())
        reason = why_not_blocks(module, packing=packing, dropout=dropout, full=trains_weights(module))
        reason = reason or cls._why_not_blocks(module, head)
        if reason is None:
            forward = FusedForward(module, keep, store, kept, whole_blocks)
            fused = cls._through(module, forward, head, Verdict("blocks", "packed"))
            if length_of_change(module) is None:  # what blocks know else, they know whatever the model's weights
                return fused
            if store is not None:
                attach_store(module, store)
            probe = cls.probe(module, store)
            difference = probe.difference(fused)
            if difference is None:
                return fused
            reason = Reason(Why.DIFFERENCE, difference.part)
        if store is not None:
            attach_store(module, store)
        probe = probe or cls.probe(module, store)
        compute_mixers(module)
        refused: list[tuple[Layout, Difference]] = []
        for layout in cls._layouts(head, packing):
            verdict = Verdict("generic", layout, cls._is_own(head), reason, tuple(refused))
            modules = ModuleForward(module, layout, checkpointing=keep != "everything", store=store, kept=kept)
            model = cls._through(module, modules, head, verdict)
            found = probe.difference(model)
            if found is None:
                return model
            refused.append((layout, found))
        raise cls._refused(module, refused[-1][1])

    # ---- what kinds of models differ in

    @classmethod
    def _head_of(cls, module: "PreTrainedModel") -> Any:
        """What comes between the last states and what the model gives."""
        raise NotImplementedError

    @classmethod
    def _is_own(cls, head: Any) -> bool:
        """Whether that is the model's own forward."""
        raise NotImplementedError

    @classmethod
    def _through(cls, module: "PreTrainedModel", backbone: Backbone, head: Any, verdict: Verdict) -> Self:
        raise NotImplementedError

    @classmethod
    def _why_not_blocks(cls, module: "PreTrainedModel", head: Any) -> Reason | None:
        """What speaks against decoder blocks beside what holds for all models."""
        return None

    @classmethod
    def _layouts(cls, head: Any, packing: bool) -> tuple[Layout, ...]:
        """Of rows, in the order in which they are tried."""
        layouts: tuple[Layout, ...] = get_args(Layout)
        return layouts[0 if packing else 1 :]

    @classmethod
    def _refused(cls, module: "PreTrainedModel", difference: Difference) -> ModelError:
        """What is said where no way agrees."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        return next(self.module.parameters()).device

    @property
    def pad_id(self) -> int:
        """What fills padded rows up: some models tell padding by it."""
        return getattr(self.module.config.get_text_config(), "pad_token_id", None) or 0

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
