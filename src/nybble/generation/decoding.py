"""Answers token by token through the decoder blocks: the same four-bit weights, and a KV cache.

    prefill   the prompts, packed side by side, through dequantised weights and packed attention
    step      one token of each text; up to MAX_ROWS texts multiply the packed weights as they lie (`decode`,
              kernels/ops/decode.py); more texts share one dequantisation

Keys and values of all layers lie on the model's device, and so does what a step has to know: it reads no
number of the host's. So where the device has graphs (memory/graph.py) a step of few texts is replayed from one, which
is captured anew when the cache grows or a text leaves.

Left out: a ring buffer for sliding windows; the cache keeps all positions and attention reads the window.
"""

import itertools
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nybble.data.packing import pack_tokens
from nybble.families.family import Family
from nybble.kernels import registry
from nybble.kernels.hardware import send
from nybble.kernels.ops.cached_attention import cached_attention
from nybble.kernels.ops.decode import (
    MAX_ROWS,
    NO_ROPE,
    DecoderInput,
    DecoderLayer,
    DecoderLinear,
    DecoderModel,
    DecoderNorm,
    decoder,
)
from nybble.layers.backbone import FusedForward
from nybble.layers.decoder_block import DecoderBlock, block_ops
from nybble.layers.layer_input import Beside, beside_states
from nybble.layers.lora import LoraLinear
from nybble.layers.loss_head import LossHead
from nybble.layers.norms import HeadsNorm, LayerNorm, Norm
from nybble.layers.own_head import loss_head
from nybble.layers.packed_rows import Angles, rotary_angles, scaled_embeddings
from nybble.layers.projection import Projection
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.layers.rotary import angles_by_length
from nybble.layers.token_rows import TokenLogits
from nybble.memory.graph import Graph, graph_on

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FIRST_ROOM = 64  # tokens that the cache has room for beyond the prompts before it grows

Attend = Callable[[Tensor], Tensor]  # heads (T, heads + 2 kv heads, head_dim) -> (T, heads * head_dim)
Widths = tuple[int, int]  # of a layer's keys and values: heads, and their width


def decoder_ops(family: Family) -> tuple[str, ...]:
    """The ops that answers of a family's models are made of."""
    forward = tuple(op for op in block_ops(family) if "backward" not in op)
    return (*forward, "gemv_4bit", "cached_attention", "decode")


class KeyValueCache:
    """Keys and values of every layer for texts of different lengths that end in the same column.

    A text's first column is its start; what stands before it is never written and never attended to. Layers that read
    another's have that one's.

    Args:
        widths: of each layer that has its own.
        owners: of each layer, which of those it has.
        lengths: tokens of each text to begin with; the longest starts in column 0.
        limit: columns it will ever need.
        dtype, device: of keys and values.

    Attributes:
        data: of each layer that has its own, (2, texts, num_kv_heads, capacity, head_dim).
        end: columns that are filled, or opened for a step.
        texts, columns, starts: int64 `(texts)` each: their numbers, the columns of their last tokens, which a step
            moves on, and their first columns.
    """

    def __init__(
        self,
        widths: Sequence[Widths],
        owners: Sequence[int],
        lengths: Sequence[int],
        limit: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.owners, self.device = owners, device
        self.end, self.limit = max(lengths), limit
        self.first_columns = [self.end - length for length in lengths]
        capacity = min(limit, self.end + FIRST_ROOM)
        self.data = [
            torch.zeros(2, len(lengths), heads, capacity, width, dtype=dtype, device=device) for heads, width in widths
        ]
        self._place_texts()

    @property
    def capacity(self) -> int:
        return self.data[0].shape[-2]

    def of_layers(self) -> list[Tensor]:
        """What each layer reads, from the first to the last."""
        return [self.data[owner] for owner in self.owners]

    def fill(self, layer: int, text: int, keys_values: Tensor) -> None:
        """Write a prompt's keys and values, `(length, 2 * kv_heads, head_dim)`."""
        rows = keys_values.unflatten(1, (2, -1)).permute(1, 2, 0, 3)  # (2, kv heads, length, head_dim)
        self.data[self.owners[layer]][:, text, :, self.first_columns[text] : self.end] = rows

    def open_column(self) -> None:
        """Make room for the texts' next tokens, which the step that `advance` begins writes."""
        if self.end == self.capacity:
            self._grow()
        self.end += 1

    def advance(self) -> None:
        """Move on to the next column, on the device."""
        self.columns += 1

    def keep(self, texts: Sequence[int]) -> None:
        """Forget all other texts."""
        index = send(torch.tensor(texts, dtype=torch.int64), self.device)
        self.data = [each.index_select(1, index) for each in self.data]
        self.first_columns = [self.first_columns[text] for text in texts]
        self._place_texts()

    def _place_texts(self) -> None:
        self.starts = send(torch.tensor(self.first_columns, dtype=torch.int64), self.device)
        self.texts = torch.arange(len(self.first_columns), device=self.device)
        self.columns = torch.full_like(self.texts, self.end - 1)

    def _grow(self) -> None:
        assert self.end < self.limit, (self.end, self.limit)
        capacity = min(self.limit, 2 * self.capacity)
        for i, data in enumerate(self.data):
            *outer, _, head_dim = data.shape
            self.data[i] = data.new_zeros(*outer, capacity, head_dim)
            self.data[i][..., : self.end, :] = data


class CachedDecoder:
    """A causal language model and the texts it is continuing; gradients are never made.

    Args:
        model: one whose `why_not_forward` is None. Its adapters are used as they are now, if they are enabled now.
        graphs: steps of few texts come from them, where the device has any.
    """

    def __init__(self, model: "PreTrainedModel", *, graphs: bool = True):
        self.model, self.backbone = model, FusedForward(model, "nothing")
        head = loss_head(model)
        assert isinstance(head, LossHead), head
        self.head = head
        self.blocks = self.backbone.blocks
        self.kinds = sorted({kind for block in self.blocks for kind in (block.kind, block.query_kind)})
        self.sources = _sources(self.blocks)
        self.layers = [
            _describe(block, self.kinds, source) for block, source in zip(self.blocks, self.sources, strict=True)
        ]
        self.few_rows = decoder(_describe_model(self.layers, self.backbone.norm, self.head))
        waits = angles_by_length(model) or registry.waits("cached_attention", head.device)
        self._graph_type = graph_on(head.device) if graphs and not waits else None
        self._graph: Graph | None = None  # of a step of the texts that there are now

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Tensor:
        """Read the prompts; the logits of each one's next token, `(texts, vocabulary)`."""
        lengths = [len(prompt) for prompt in prompts]
        borders = list(itertools.accumulate(lengths, initial=0))
        x, rows, beside = self.backbone.embed(pack_tokens(prompts).to(self.head.device))
        limit = max(lengths) + max_new_tokens
        own = [i for i, source in enumerate(self.sources) if source is None]
        widths = [(self.blocks[i].num_kv_heads, self.blocks[i].head_dim) for i in own]
        owners = [own.index(i if source is None else source) for i, source in enumerate(self.sources)]
        self.cache = KeyValueCache(widths, owners, lengths, limit, x.dtype, x.device)

        def attend(layer: int, heads: Tensor) -> Tensor:
            block = self.blocks[layer]
            for text, (first, last) in enumerate(itertools.pairwise(borders) if not block.reads_keys else ()):
                self.cache.fill(layer, text, heads[first:last, block.num_heads :])
            return block.attend(heads.flatten(1), rows)[0]

        attends = [partial(attend, layer) for layer in range(len(self.blocks))]
        x = self._through_blocks(x, rows.angles, attends, beside)
        self._settle()
        return self._logits(x[send(torch.tensor(borders[1:]) - 1, x.device)])

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each text, int64 `(texts)`; the logits of the next ones, `(texts, vocabulary)`, valid until
        the next step.
        """
        capacity = self.cache.capacity
        self.cache.open_column()
        if self.cache.capacity != capacity:
            self._settle()
        self._tokens.copy_(tokens)
        return self._step() if self._graph is None else self._graph()

    def keep(self, texts: Sequence[int]) -> None:
        """Go on with these texts only, in this order."""
        self.cache.keep(texts)
        self._settle()

    def _settle(self) -> None:
        """What steps read and write lies elsewhere from now on."""
        self._tokens = torch.zeros_like(self.cache.texts)
        self._graph = None
        if self._graph_type is not None and 0 < len(self._tokens) <= MAX_ROWS:
            # It must not hold what holds it, or the cache would stay until Python looks for cycles.
            self._graph = self._graph_type(partial(CachedDecoder._step, weakref.proxy(self)))

    def _step(self) -> Tensor:
        """A step of `_tokens`."""
        cache = self.cache
        cache.advance()
        embedded = self.model.base_model.embed_tokens(self._tokens)  # (texts, hidden)
        x, beside = scaled_embeddings(self.model, embedded), beside_states(self.model, self._tokens, embedded)
        angles = rotary_angles(self.model, (cache.columns - cache.starts)[:, None])
        where = cache.texts, cache.columns, cache.starts
        if len(x) <= MAX_ROWS:
            cos, sin = zip(*(angles[kind] for kind in self.kinds), strict=True)
            return self.head.finish(self.few_rows.step(x, cos, sin, cache.of_layers(), *where, beside.inputs))

        def attend(layer: DecoderLayer, keys_values: Tensor, heads: Tensor) -> Tensor:
            return cached_attention(
                heads, keys_values, *where, scale=layer.scale, window=layer.window, softcap=layer.softcap
            )

        attends = [partial(attend, *each) for each in zip(self.layers, cache.of_layers(), strict=True)]
        return self._logits(self._through_blocks(x, angles, attends, beside))

    def _through_blocks(self, x: Tensor, angles: Angles, attends: Sequence[Attend], beside: Beside) -> Tensor:
        for block, attend in zip(self.blocks, attends, strict=True):
            heads = block.queries_keys_values(block.attention_input(x)[0], angles, block.reads(beside))
            block.leave(beside, heads.qkv)
            x2, _ = block.attention_output(attend(block.by_head(heads.qkv)), x)
            x, _ = block.mlp_output(block.gate(block.mlp_input(block.mlp_reads(x, x2))[0])[0], x2)
            x = block.finished(block.own_input_added(x, beside))
        return x

    def _logits(self, x: Tensor) -> Tensor:
        if len(x) <= MAX_ROWS:
            return self.head.finish(self.few_rows.logits(x))
        return self.head.logits(self.backbone.norm.module(x))


# ---- what the op is told -------------------------------------------------------------------------


def _describe_model(layers: Sequence[DecoderLayer], norm: Norm, head: LossHead) -> DecoderModel:
    assert isinstance(head.weight, Tensor), "a streamed model does not generate"
    described = DecoderLinear(head.weight.detach(), None, *_describe_adapter(head.adapter))
    return DecoderModel(layers, _describe_norm(norm), described, norm.weight.dtype)


def _sources(blocks: Sequence[DecoderBlock]) -> list[int | None]:
    """Of each block the one whose keys and values it reads, None where it has its own."""
    given: dict[str, int] = {}
    sources: list[int | None] = []
    for i, block in enumerate(blocks):
        sources.append(given[block.kind] if block.reads_keys else None)
        if block.gives_keys:
            given[block.kind] = i
    return sources


def _describe(block: DecoderBlock, kinds: Sequence[str], reads_keys: int | None) -> DecoderLayer:
    """A block as it is now: an adapter counts if it is enabled now.

    Args:
        kinds: of rotary angles, in their order.
        reads_keys: the layer whose keys and values it reads.
    """

    def linears(projection: Projection) -> list[DecoderLinear]:
        return [_describe_linear(*each) for each in zip(projection.linears, projection.adapters, strict=True)]

    def norm(each: Norm | None) -> DecoderNorm | None:
        return None if each is None else _describe_norm(each)

    q_norm, k_norm, v_norm, *_ = (*map(norm, block.head_norms), None, None, None)
    own, own_input = block.layer_input, None
    if own is not None:
        own_input = DecoderInput(linears(own.gate), linears(own.project), _describe_norm(own.norm))
    return DecoderLayer(
        qkv=linears(block.qkv),
        o=linears(block.o),
        gate_up=linears(block.gate_up),
        down=linears(block.down),
        input_norm=norm(block.input_norm),
        mlp_norm=norm(block.mlp_norm),
        q_norm=q_norm,
        k_norm=k_norm,
        num_heads=block.num_heads,
        num_kv_heads=block.num_kv_heads,
        head_dim=block.head_dim,
        window=block.window,
        scale=block.scale,
        attention_output_norm=norm(block.attention_output_norm),
        mlp_output_norm=norm(block.mlp_output_norm),
        activation=block.activation,
        softcap=block.softcap,
        rope=kinds.index(block.kind) if block.rotated else NO_ROPE,
        query_rope=kinds.index(block.query_kind) if block.rotated else NO_ROPE,
        neighbours=block.neighbours,
        residual=block.residual,
        gated=block.gated,
        parallel=block.parallel,
        v_norm=v_norm,
        reads_keys=reads_keys,
        values_are_keys=block.values_are_keys,
        own_input=own_input,
        factor=block.factor,
    )


def _describe_linear(linear: Any, adapter: LoraLinear | None) -> DecoderLinear:
    weight = linear.quantized() if isinstance(linear, QuantizedLinear) else linear.weight.detach()
    bias = None if linear.bias is None else linear.bias.detach()
    return DecoderLinear(weight, bias, *_describe_adapter(adapter))


def _describe_adapter(adapter: LoraLinear | TokenLogits | None) -> tuple[Tensor | None, Tensor | None]:
    if adapter is None or not adapter.enabled:
        return None, None
    return adapter.lora_A.detach() * adapter.scaling, adapter.lora_B.detach()


def _describe_norm(norm: Norm) -> DecoderNorm:
    if isinstance(norm, HeadsNorm):
        return DecoderNorm(norm.weight, norm.eps, centred=True)
    if isinstance(norm, LayerNorm):
        return DecoderNorm(norm.weight, norm.eps, norm.bias, centred=True)
    return DecoderNorm(norm.weight.float() + norm.offset if norm.offset else norm.weight, norm.eps)
