"""From token ids to the hidden states that the loss head reads.

Two ways, same numbers. `BlockBackbone` runs packed batches through nybble's decoder blocks, for the
families they know. `GenericBackbone` runs any transformers decoder through its own modules, packed where
that gives what each row gives alone, else padded, else a row at a time. `choose_backbone` takes the first that
agrees with the model's own forward and loss (`layers/probe.py`), and the `Verdict` says which, and why.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from nybble.errors import ModelError
from nybble.kernels.heap import TrimmedHeap, give_back_free
from nybble.layers.convert import adapters_of
from nybble.layers.decoder_block import DecoderBlock, DenseWeights, Keep, Rows
from nybble.layers.loss_head import Head, OwnHead, decoder_of, is_plain, loss_head
from nybble.layers.probe import Difference, Layout, Probe, Way, accepted
from nybble.layers.rotary import length_of_change, rotate_rows_alone
from nybble.layers.streamed import BlockStore, attach_store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKEN_MULTIPLE = 64  # oneDNN keeps a compiled product, some 0.8 MB, for each shape it has seen
BLOCK_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

BLOCKS_A_TRIM = 4  # each costs 3 % of the time; at every eighth the heap would grow by a fourth more

Path = Literal["blocks", "generic"]


class Why(StrEnum):
    """Why decoder blocks do not compute a model."""

    NOT_PACKED = "rows are not packed"
    FAMILY = f"decoder blocks know {', '.join(BLOCK_FAMILIES)}; this is {{}}"
    ACTIVATION = "decoder blocks know SwiGLU; this model's activation is {}"
    DROPOUT = "decoder blocks have no adapter dropout"
    DEVICE = "decoder blocks are made for the CPU"
    HEAD = "decoder blocks end in a linear head"
    DIFFERENCE = "decoder blocks differ from the model's own forward in {}"


@dataclass(frozen=True)
class Reason:
    """One of them, with what it is about."""

    why: Why
    what: str = ""

    def __str__(self) -> str:
        return self.why.format(self.what)


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
        """For the user: which path runs, and why."""
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


class Backbone(Way, Protocol):
    """A way from tokens to hidden states, with the model that it goes through and the head that it ends in."""

    model: "PreTrainedModel"
    verdict: Verdict
    head: Head
    name: str  # for the user: which path runs, and why

    @property
    def packing(self) -> bool:
        """Whether it takes packed batches, else padded ones."""
        ...


class KeptTensors(Protocol):
    """Takes tensors until backward needs them, in reverse: all of the last block, then all of the one before."""

    def begin(self) -> None:
        """A new micro-batch: what the last one left is forgotten."""
        ...

    def next_block(self) -> None:
        """What follows is kept by the next block."""
        ...

    def put(self, tensor: Tensor) -> Any: ...

    def get(self, place: Any) -> Tensor: ...


class GenericBackbone:
    """Through transformers' own forward and autograd.

    Args:
        checkpointing: recompute each layer in backward instead of keeping its activations.
        verdict: with the layout of the batches: packed ones are taken, or padded ones.
        store: of a streamed base's blocks.
        kept: takes what is saved for backward; memory does where it is None.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        checkpointing: bool,
        verdict: Verdict,
        head: Head | None = None,
        store: BlockStore | None = None,
        kept: KeptTensors | None = None,
    ):
        self.model, self.verdict, self.store, self.kept = model, verdict, store, kept
        self.head = head or loss_head(model)
        self._trims = checkpointing and kept is None and next(model.parameters()).device.type == "cpu"
        if store is not None:
            attach_store(model, store)
        if checkpointing and model.supports_gradient_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            model.disable_input_require_grads()  # for reentrant ones; some models add to the embedding's in place
        self.layout = verdict.layout
        self.name = verdict.describe() + ("" if store is None else ", streamed")

    @property
    def packing(self) -> bool:
        return self.layout == "packed"

    def states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if self.store is not None:
            self.store.begin(will_return=torch.is_grad_enabled())
        kept = TrimmedHeap(BLOCKS_A_TRIM) if self._trims else self.kept
        if kept is None:
            return self._all_states(input_ids, position_ids, attention_mask).flatten(0, 1)[positions]
        kept.begin()
        kept.next_block()  # what is kept at all lies between blocks
        with saved_tensors_hooks(kept.put, kept.get):
            states = self._all_states(input_ids, position_ids, attention_mask)
        if self._trims:
            give_back_free()  # the head needs much at once
        return states.flatten(0, 1)[positions]

    def _all_states(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, T) -> (B, T, hidden); zeros on the padding of rows that go through one at a time."""
        if self.layout != "single" or attention_mask is None:
            return decoder_states(self.model, input_ids, position_ids, attention_mask)
        width = input_ids.shape[1]
        rows = []
        for ids, places, length in zip(input_ids, position_ids, attention_mask.sum(dim=1).tolist(), strict=True):
            states = decoder_states(self.model, ids[None, :length], places[None, :length])
            rows.append(F.pad(states[0], (0, 0, 0, width - length)))
        return torch.stack(rows)


class BlockBackbone:
    """Through nybble's decoder blocks; packed batches only.

    Args:
        keep: what each block keeps for its backward.
        store: of a streamed base's blocks.
        kept: takes what blocks save for their backward; memory does where it is None.
    """

    layout: Layout = "packed"
    packing = True
    verdict = Verdict("blocks", "packed")

    def __init__(
        self, model: "PreTrainedModel", keep: Keep, store: BlockStore | None = None, kept: KeptTensors | None = None
    ):
        self.model, self.keep, self.kept = model, keep, kept
        self.head: Head = loss_head(model)
        self.weights = DenseWeights(store)
        self.blocks = [decoder_block(layer, model.config, self.weights) for layer in model.base_model.layers]
        self.name = f"decoder blocks, keeping {keep}{'' if store is None else ', streamed'}"

    def states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        assert cu_seqlens is not None and attention_mask is None, "decoder blocks take packed batches"
        self.weights.begin(will_return=torch.is_grad_enabled())
        x, rows = self.embed(input_ids, position_ids, cu_seqlens)
        for block in self.blocks:  # together, not among what the blocks free
            block.refresh_adapters(x.dtype)
        if self.kept is None:
            for block in self.blocks:
                x = block(x, rows, self.keep)
        else:
            self.kept.begin()
            with saved_tensors_hooks(self.kept.put, self.kept.get):
                for block in self.blocks:
                    self.kept.next_block()
                    x = block(x, rows, self.keep)
        return self.model.base_model.norm(x[positions])

    def embed(self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Rows]:
        """What the first block takes, `(T, hidden)` and where its rows lie; filled up with an arbitrary document."""
        input_ids, position_ids, cu_seqlens = _fill_up(input_ids, position_ids, cu_seqlens)
        cos, sin = rotary_angles(self.model, position_ids)
        return self.model.base_model.embed_tokens(input_ids[0]), Rows(cos, sin, cu_seqlens)


def decoder_block(layer: Any, config: Any, weights: DenseWeights) -> DecoderBlock:
    """The decoder block over one layer of a model with this config, as the layer's linears are now."""
    config = config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return DecoderBlock(layer, head_dim, _window(layer, config), weights)


def rotary_angles(model: "PreTrainedModel", position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the model's own RoPE variant, each fp32 `(B * T, rotary_dim / 2)`, for positions `(B, T)`.

    In fp32 whatever the compute dtype: bf16 positions lose whole tokens beyond 256.
    """
    cos, sin = model.base_model.rotary_emb(torch.empty(0, device=position_ids.device), position_ids)
    half = cos.shape[-1] // 2  # transformers repeats each angle for the two elements it turns
    return cos[..., :half].flatten(0, 1).contiguous(), sin[..., :half].flatten(0, 1).contiguous()


def _fill_up(input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Append a document of arbitrary tokens, so that the row has a multiple of TOKEN_MULTIPLE tokens.

    Attention keeps it apart and no position of it is asked for, so it changes no state and no gradient.
    """
    missing = -input_ids.shape[1] % TOKEN_MULTIPLE
    if not missing:
        return input_ids, position_ids, cu_seqlens
    filled, positions = F.pad(input_ids, (0, missing)), F.pad(position_ids, (0, missing))
    return filled, positions, torch.cat([cu_seqlens, cu_seqlens[-1:] + missing])


def choose_backbone(
    model: "PreTrainedModel",
    *,
    keep: Keep,
    packing: bool,
    store: BlockStore | None = None,
    kept: KeptTensors | None = None,
) -> Backbone:
    """Decoder blocks where they know the model and rows are packed, else the generic path, which says why.

    Raises:
        ModelError: no way gives what the model's own forward and loss give; the message names the part that differs.
    """
    rotate_rows_alone(model)
    probe: Probe | None = None
    reason = why_not_blocks(model) if packing else Reason(Why.NOT_PACKED)
    if reason is None:
        blocks = BlockBackbone(model, keep, store, kept)
        if length_of_change(model) is None:  # what blocks know else, they know whatever the model's weights
            return blocks
        if store is not None:
            attach_store(model, store)
        probe = Probe(model, store)
        difference = probe.difference(blocks, blocks.head)
        if difference is None:
            return blocks
        reason = Reason(Why.DIFFERENCE, difference.part)
    return _generic_backbone(model, keep, packing, reason, store, kept, probe)


def _generic_backbone(
    model: "PreTrainedModel",
    keep: Keep,
    packing: bool,
    reason: Reason,
    store: BlockStore | None,
    kept: KeptTensors | None,
    probe: Probe | None,
) -> GenericBackbone:
    """In the first layout that agrees with the model's own forward and loss."""
    head = loss_head(model)
    if store is not None:
        attach_store(model, store)
    probe = probe or Probe(model, store)
    refused: list[tuple[Layout, Difference]] = []
    for layout in get_args(Layout)[0 if packing else 1 :]:
        verdict = Verdict("generic", layout, isinstance(head, OwnHead), reason, tuple(refused))
        backbone = GenericBackbone(
            model, checkpointing=keep != "everything", verdict=verdict, head=head, store=store, kept=kept
        )
        found = probe.difference(backbone, head)
        if found is None:
            return backbone
        refused.append((layout, found))
    _, difference = refused[-1]
    raise ModelError(
        f"nybble cannot train {type(model).__name__} on its own loss: {difference.part} differs by "
        f"{difference.size:.1%} from its own forward's, also for a row alone.",
        "Allowed: models whose loss comes from their decoder's last states, token by token.",
        "Please report the model's type; other models of transformers, and --compute-dtype fp32, may work.",
    )


def why_not_blocks(model: "PreTrainedModel") -> Reason | None:
    """None when nybble's decoder blocks train this model, else the reason."""
    why = why_not_forward(model)
    if why is None and any(adapter.dropout for adapter in adapters_of(model).values()):
        return Reason(Why.DROPOUT)
    return why


def why_not_forward(model: "PreTrainedModel") -> Reason | None:
    """None when nybble's decoder blocks compute this model's answers, in which nothing is dropped, else the reason."""
    why = why_not_config(model.config.get_text_config())
    if why is not None:
        return why
    if next(model.parameters()).device.type != "cpu":
        return Reason(Why.DEVICE)
    if not is_plain(model.get_output_embeddings()):
        return Reason(Why.HEAD)
    return None


def why_not_config(config: Any) -> Reason | None:
    """None when nybble's decoder blocks know models of this config, else the reason."""
    if config.model_type not in BLOCK_FAMILIES:
        return Reason(Why.FAMILY, config.model_type)
    if config.hidden_act != "silu":
        return Reason(Why.ACTIVATION, config.hidden_act)
    return None


def _window(layer: Any, config: Any) -> int:
    """Tokens a layer's attention sees, 0 for all: Qwen sets it per layer, Mistral for the whole model."""
    attention = layer.self_attn
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window or 0
    return getattr(config, "sliding_window", None) or 0


def decoder_states(
    model: "PreTrainedModel", input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """The final hidden states of a transformers causal language model, `(B, T, hidden)`."""
    base = decoder_of(model) if model.base_model is model else model.base_model
    wanted = {"position_ids": position_ids, "attention_mask": attention_mask, "use_cache": False}
    states: Tensor = base(input_ids=input_ids, **accepted(base, **wanted)).last_hidden_state
    return states
