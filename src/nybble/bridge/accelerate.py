"""`accelerate`: a transformers model's decoder layers compute through nybble's blocks, within any script.

Each layer's place in `model.layers` gets a module of a class derived from the layer's own, with the same submodules and
the same parameters under the same names: checkpoints, PEFT and what looks for the class see what they saw. Its forward
takes what transformers hands it (states, mask, rotary angles) and gives what transformers expects. What the blocks do
not know is computed by the layer's own code: generation with a cache, adapters with dropout, unusual masks.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nybble.bridge.masked_rows import Rows, read_borders, read_mask
from nybble.bridge.peft_layers import is_peft_lora, state_of, view, why_not_viewed
from nybble.errors import ModelError
from nybble.families import FAMILIES, family_of
from nybble.layers.backbone import why_not_forward
from nybble.layers.decoder_block import DecoderBlock
from nybble.layers.packed_rows import PackedSequences
from nybble.layers.projection import DenseWeights


class Acceleration:
    """What `accelerate` has done to a model.

    Attributes:
        layers: the layers that compute through nybble's blocks.
        reasons: why layers computed through their own code while they trained, as far as they did.
    """

    def __init__(self, layers: nn.ModuleList, reasons: set[str]):
        self.layers, self.reasons = layers, reasons

    def undo(self) -> None:
        """Put the model's own layers back; what they learnt stays."""
        for i, layer in enumerate(self.layers):
            if isinstance(layer, AcceleratedLayer):
                self.layers[i] = layer.as_own()


def accelerate(model: Any) -> Acceleration:
    """Let the decoder layers of a transformers or PEFT model compute through nybble's blocks, in place.

    Before or after `get_peft_model`; then any Trainer, or a loop of one's own. Frozen weights may be in few bits or in
    16; LoRA, rsLoRA and DoRA are computed, dropout is not. Loss, head and padding stay the script's: padded positions
    are left out of a block's products, and their states become zero.

    Args:
        model: a transformers causal language model, or PEFT's around one.

    Returns:
        what was done; its `undo` puts the model's own layers back.

    Raises:
        ModelError: nybble's blocks do not know the model; the message says what of it.

    Example:
        >>> done = nybble.accelerate(in_hand)
        >>> type(in_hand.model.layers[0]).__name__
        'AcceleratedLlamaDecoderLayer'
        >>> done.undo()
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(
            f"A {type(inner).__name__} cannot be accelerated.",
            "Allowed: a causal language model of transformers, or PEFT's around one.",
        )
    reason = why_not_forward(inner)
    family = family_of(inner.config.get_text_config())
    if reason is not None or family is None or family.growing_queries or family.beside:
        dense = (name for name, known in FAMILIES.items() if known.mixture is None)
        own = "its layers read more than states" if family and family.beside else "its queries grow with their position"
        raise ModelError(
            f"{type(inner).__name__} cannot be accelerated: {reason or own}.",
            f"Allowed: models of {', '.join(dense)} whose layers are as published.",
            "Leave nybble.accelerate out: the model trains through its own layers.",
        )
    layers = inner.base_model.layers
    shared = _Shared()
    for i, layer in enumerate(layers):
        if not isinstance(layer, AcceleratedLayer):
            layers[i] = _accelerated(layer, inner.config.get_text_config(), shared)
    return Acceleration(layers, shared.reasons)


class _Shared:
    """What the layers of a model share: room for dense weights, and what the last batch looked like."""

    def __init__(self) -> None:
        self.weights, self.reasons = DenseWeights(), set[str]()
        self._seen: dict[int, tuple[Tensor | None, Any, Rows | None]] = {}

    def rows(self, keywords: Any, x: Tensor, window: int) -> Rows | None:
        """As `read_mask` or `read_borders`, read once for the layers that get the same."""
        mask, borders = keywords.get("attention_mask"), keywords.get("cu_seq_lens_q")
        says = borders if mask is None else mask  # for flash attention there is no mask
        batch = (x.shape[:2], x.device)
        seen = self._seen.get(window)
        if seen is None or seen[0] is not says or seen[1] != batch:
            length = x.shape[1]
            rows = (
                read_mask(mask, len(x), length, window, x.device)
                if says is mask
                else read_borders(says, len(x) * length)
            )
            seen = self._seen[window] = (says, batch, rows)
        return seen[2]

    def say(self, reason: str) -> None:
        """Once a reason."""
        if reason not in self.reasons:
            self.reasons.add(reason)
            warnings.warn(
                f"Layers train through their own code and not through nybble's blocks, because {reason}.", stacklevel=2
            )


class AcceleratedLayer(nn.Module):
    """Mixed in before a decoder layer's own class; made by `_accelerated`."""

    accelerated_by: tuple[Any, _Shared]
    gradient_checkpointing: bool

    def forward(self, hidden_states: Tensor, *args: Any, **keywords: Any) -> Any:
        """(B, T, hidden) -> the same, as the layer's own forward."""
        found = self._block_and_rows(hidden_states, args, keywords)
        if not isinstance(found, str):
            return self._through_block(hidden_states, *found, keywords["position_embeddings"])
        if self.training and torch.is_grad_enabled():
            self.accelerated_by[1].say(found)
        return self.as_own(shares=True).forward(hidden_states, *args, **keywords)

    def as_own(self, *, shares: bool = False) -> Any:
        """The layer in its own class, over the same submodules and parameters.

        Args:
            shares: it is this very layer, seen for one call.
        """
        own_class: Any = type(self).__mro__[2]
        own = own_class.__new__(own_class)
        own.__dict__ = self.__dict__ if shares else {k: v for k, v in self.__dict__.items() if k not in _OURS}
        return own

    def _block_and_rows(self, x: Tensor, args: Sequence[Any], keywords: Any) -> tuple[DecoderBlock, Rows] | str:
        """What computes this call, or why it is not for a block."""
        if args or keywords.get("position_embeddings") is None:
            return "layers are called in a way that blocks do not know"
        if keywords.get("past_key_values") is not None:
            return "a cache of keys and values is filled: pass use_cache=False"
        if keywords.get("output_attentions"):
            return "attention weights are asked for"
        block = self._block()
        if isinstance(block, str):
            return block
        if x.dtype != block.dtype:
            return f"states are {x.dtype} and norms {block.dtype}"
        rows = self.accelerated_by[1].rows(keywords, x, block.window)
        return (block, rows) if rows else "the attention mask is not that of causal attention within documents"

    def _block(self) -> "DecoderBlock | str":
        """The block over the layer as it is now, or why there is none."""
        config, _ = self.accelerated_by
        family = FAMILIES[config.model_type].of(config)
        linears = [self.get_submodule(name) for name in family.linears]
        parameters = [(id(each), each.requires_grad) for each in self.parameters()]
        adapters = [state_of(each) for each in linears if is_peft_lora(each)]
        now = (parameters, adapters, self.training)
        # Two, since preferences ask the model with its adapter and without it in turns.
        made: list[tuple[object, DecoderBlock | str]] = self.__dict__.setdefault("_blocks", [])
        block = next((block for of, block in made if of == now), None) or self._make_block(linears, family, config)
        made[:] = [(now, block), *(each for each in made if each[0] != now)][:2]
        return block

    def _make_block(self, linears: Sequence[nn.Module], family: Any, config: Any) -> "DecoderBlock | str":
        for linear in linears:
            if (why := why_not_viewed(linear, training=self.training)) is not None:
                return why
        for option in ("attention_dropout", *family.dropouts) if self.training else ():
            if getattr(config, option, False):
                return f"of {option}"
        block = DecoderBlock(_View(self), family, config, self.accelerated_by[1].weights)
        known = {id(each) for each in block.parameters()}
        other = next((n for n, each in self.named_parameters() if each.requires_grad and id(each) not in known), None)
        return block if other is None else f"{other} is trained too"

    def _through_block(
        self, x: Tensor, block: DecoderBlock, rows: Rows, position_embeddings: tuple[Tensor, Tensor]
    ) -> Tensor:
        config, shared = self.accelerated_by
        batch, length, width = x.shape
        flat = x.reshape(batch * length, width)
        angles = _angles(position_embeddings, FAMILIES[config.model_type].angles_in_pairs, batch)
        if rows.tokens is not None:
            flat = flat.index_select(0, rows.tokens)
            cos, sin = (each.index_select(0, rows.tokens) for each in angles)
            angles = cos, sin
        shared.weights.begin(will_return=torch.is_grad_enabled())
        for projection in block.projections:
            projection.forget_adapters()
        sequences = PackedSequences({block.kind: angles}, rows.cu_seqlens, rows.max_length)
        with torch.autocast(x.device.type, enabled=False):
            y = block(flat, sequences, "nothing" if self.gradient_checkpointing and self.training else "everything")
        if rows.tokens is not None:
            y = y.new_zeros(batch * length, width).index_copy(0, rows.tokens, y)
        return y.view(batch, length, width)


_OURS = ("accelerated_by", "_blocks")


class _View:
    """A layer as `DecoderBlock` takes it: linears with PEFT's adapters seen as nybble's."""

    def __init__(self, layer: Any):
        self.layer, self.self_attn = layer, layer.self_attn

    def get_submodule(self, name: str) -> nn.Module:
        return view(self.layer.get_submodule(name))

    def parameters(self) -> Any:
        return self.layer.parameters()


@functools.cache
def _accelerating(own_class: Any) -> type[AcceleratedLayer]:
    made: Any = type(f"Accelerated{own_class.__name__}", (AcceleratedLayer, own_class), {})
    made.forward = AcceleratedLayer.forward  # transformers has wrapped it, as that of each subclass of a layer
    accelerating: type[AcceleratedLayer] = made
    return accelerating


def _accelerated(layer: nn.Module, config: Any, shared: _Shared) -> nn.Module:
    """A module over the layer's own submodules and parameters."""
    own_class: Any = type(layer)
    kind = _accelerating(own_class)
    accelerated = kind.__new__(kind)
    accelerated.__dict__ = {**layer.__dict__, "accelerated_by": (config, shared)}
    return accelerated


def _angles(embeddings: tuple[Tensor, Tensor], in_pairs: bool, batch: int) -> tuple[Tensor, Tensor]:
    """transformers' cos and sin `(1 or B, T, rotary_dim)`, each angle once: fp32 `(B * T, rotary_dim / 2)`."""
    once = slice(None, None, 2) if in_pairs else slice(embeddings[0].shape[-1] // 2)
    cos, sin = (each[..., once].float().expand(batch, -1, -1).flatten(0, 1).contiguous() for each in embeddings)
    return cos, sin
