"""From token ids to the hidden states that the loss head reads.

Two ways, same numbers. `BlockBackbone` runs packed batches through nybble's decoder blocks, for the
families they know. `GenericBackbone` runs any transformers decoder through its own modules, packed where
the model's attention keeps documents apart, else padded; `choose_backbone` takes the first that can.
"""

from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from nybble.kernels.heap import give_back_free
from nybble.layers.convert import adapters_of
from nybble.layers.decoder_block import DecoderBlock, DenseWeights, Keep, Rows
from nybble.layers.streamed import BlockStore, attach_store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKEN_MULTIPLE = 64  # oneDNN keeps a compiled product, some 0.8 MB, for each shape it has seen
BLOCK_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

BLOCKS_A_TRIM = 4  # each costs 3 % of the time; at every eighth the heap would grow by a fourth more

_DOCUMENTS = ((3, 1, 4, 1, 5), (9, 2, 6))  # arbitrary small token ids
_TOLERANCE_EPS = 8  # a difference in the states of so many roundings of the dtype is noise


class Backbone(Protocol):
    """A model's way from tokens to hidden states."""

    model: "PreTrainedModel"
    packing: bool  # whether it takes packed batches, else padded ones
    name: str  # for the user: which path runs, and why

    def states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states at `positions`.

        Args:
            input_ids, position_ids: int64 `(B, T)`; B is 1 when packed, positions restarting per document.
            positions: int64 `(N,)`, indices into the flattened B * T positions.
            cu_seqlens: int32 `(num_documents + 1)`, the documents' borders, when packed.
            attention_mask: `(B, T)`, 1 on tokens and 0 on padding, when padded.

        Returns:
            `(N, hidden)` in the compute dtype.
        """
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
        packing: take packed batches, if the model's attention allows it.
        store: of a streamed base's blocks.
        kept: takes what is saved for backward; memory does where it is None.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        checkpointing: bool,
        packing: bool,
        why: str,
        store: BlockStore | None = None,
        kept: KeptTensors | None = None,
    ):
        self.model, self.store, self.kept = model, store, kept
        self._trims = checkpointing and kept is None and next(model.parameters()).device.type == "cpu"
        if store is not None:
            attach_store(model, store)
        if checkpointing and model.supports_gradient_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        self.packing = packing and keeps_documents_apart(model)
        padded = "" if self.packing or not packing else "; rows are padded, since its attention mixes packed ones"
        self.name = f"generic path ({why}){padded}{'' if store is None else ', streamed'}"

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
        kept = _TrimmedHeap() if self._trims else self.kept
        if kept is None:
            return decoder_states(self.model, input_ids, position_ids, attention_mask).flatten(0, 1)[positions]
        kept.begin()
        kept.next_block()  # what is kept at all lies between blocks
        with saved_tensors_hooks(kept.put, kept.get):
            states = decoder_states(self.model, input_ids, position_ids, attention_mask)
        if self._trims:
            give_back_free()  # the head needs much at once
        return states.flatten(0, 1)[positions]


class _TrimmedHeap:
    """Leaves tensors where they are; when a block hands over its input, now and then trims the heap.

    Without it the free pieces between blocks' inputs came to four times what was alive (135M, 1,024 tokens).
    """

    def begin(self) -> None:
        self._count = 0

    def next_block(self) -> None:
        pass

    def put(self, tensor: Tensor) -> Tensor:
        self._count += 1
        if self._count % BLOCKS_A_TRIM == 0:
            give_back_free()
        return tensor.detach()  # the tensor itself would hold the graph that holds it

    get = put


class BlockBackbone:
    """Through nybble's decoder blocks; packed batches only.

    Args:
        keep: what each block keeps for its backward.
        store: of a streamed base's blocks.
        kept: takes what blocks save for their backward; memory does where it is None.
    """

    packing = True

    def __init__(
        self, model: "PreTrainedModel", keep: Keep, store: BlockStore | None = None, kept: KeptTensors | None = None
    ):
        self.model, self.keep, self.kept = model, keep, kept
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
    """cos and sin of the model's own RoPE variant, each fp32 `(T, rotary_dim / 2)`, for positions `(1, T)`.

    In fp32 whatever the compute dtype: bf16 positions lose whole tokens beyond 256.
    """
    cos, sin = model.base_model.rotary_emb(torch.empty(0, device=position_ids.device), position_ids)
    half = cos.shape[-1] // 2  # transformers repeats each angle for the two elements it turns
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def _fill_up(input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Append a document of arbitrary tokens, so that the row has a multiple of TOKEN_MULTIPLE tokens.

    Attention keeps it apart and no position of it is asked for, so it changes no state and no gradient.
    """
    missing = -input_ids.shape[1] % TOKEN_MULTIPLE
    if not missing:
        return input_ids, position_ids, cu_seqlens
    # Positions of 0: larger ones than the rows have would change the angles of dynamic RoPE.
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
    """Decoder blocks where they know the model and rows are packed, else the generic path, which says why."""
    why = "rows are not packed" if not packing else why_not_blocks(model)
    if why is None:
        return BlockBackbone(model, keep, store, kept)
    return GenericBackbone(model, checkpointing=keep != "everything", packing=packing, why=why, store=store, kept=kept)


def why_not_blocks(model: "PreTrainedModel") -> str | None:
    """None when nybble's decoder blocks train this model, else the reason."""
    why = why_not_forward(model)
    if why is None and any(adapter.dropout for adapter in adapters_of(model).values()):
        return "decoder blocks have no adapter dropout"
    return why


def why_not_forward(model: "PreTrainedModel") -> str | None:
    """None when nybble's decoder blocks compute this model's answers, in which nothing is dropped, else the reason."""
    why = why_not_config(model.config.get_text_config())
    if why is not None:
        return why
    if next(model.parameters()).device.type != "cpu":
        return "decoder blocks are made for the CPU"
    return None


def why_not_config(config: Any) -> str | None:
    """None when nybble's decoder blocks know models of this config, else the reason."""
    if config.model_type not in BLOCK_FAMILIES:
        return f"decoder blocks know {', '.join(BLOCK_FAMILIES)}; this is {config.model_type}"
    if config.hidden_act != "silu":
        return f"decoder blocks know SwiGLU; this model's activation is {config.hidden_act}"
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
    output = model.base_model(
        input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
    )
    return output.last_hidden_state


@torch.no_grad()
def keeps_documents_apart(model: "PreTrainedModel") -> bool:
    """Whether two documents packed into one row give the states that each gives alone.

    transformers reads packing off the restarting positions in models that build their attention mask with
    its shared helpers; this asks the model at hand.
    """
    device = next(model.parameters()).device

    def states(*documents: tuple[int, ...]) -> Tensor:
        ids = torch.tensor([[token for document in documents for token in document]], device=device)
        positions = torch.tensor([[i for document in documents for i in range(len(document))]], device=device)
        return decoder_states(model, ids, positions)[0].float()  # (T, hidden)

    was_training = model.training
    model.eval()
    packed = states(*_DOCUMENTS)
    alone = torch.cat([states(document) for document in _DOCUMENTS])
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    tolerance = max(1e-4, _TOLERANCE_EPS * torch.finfo(dtype).eps) * alone.abs().max()
    model.train(was_training)
    return bool((packed - alone).abs().max() <= tolerance)
