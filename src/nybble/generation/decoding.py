"""Answers token by token through the decoder blocks: the same four-bit weights, and a KV cache.

    prefill   the prompts, packed side by side, through dequantised weights and packed attention
    step      one token of each text; up to FEW_ROWS texts multiply the packed weights as they lie, all layers and
              the head in one kernel (kernels/decode_cpu.py); more texts share one dequantisation

Where that kernel is missing or does not know a weight's format, few rows go through the layers op by op, which is
also the kernel's twin. Keys and values of all layers lie in one tensor, contiguous for the kernel. A's and B's
products run in fp32: on few rows nothing is gained by less.

Left out: a ring buffer for sliding windows; the cache keeps all positions and attention reads the window.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.data.packing import pack_tokens
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels import block_ops, decode_cpu
from nybble.kernels.decode_cpu import DecoderKernel, DecoderLayer, DecoderLinear, DecoderNorm
from nybble.layers.backbone import FusedForward
from nybble.layers.decoder_block import DecoderBlock, Projection, rotary_angles
from nybble.layers.lora import LoraLinear
from nybble.layers.loss_head import LossHead, loss_head
from nybble.layers.quantized_linear import QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEW_ROWS = decode_cpu.MAX_ROWS  # up to which multiplying packed weights beats dequantising them first
FIRST_ROOM = 64  # tokens that the cache has room for beyond the prompts before it grows

Product = Callable[[Tensor], Tensor]  # (T, in) -> (T, out)
Attend = Callable[[int, Tensor], Tensor]  # layer, heads (T, heads + 2 kv heads, head_dim) -> (T, heads * head_dim)


class KeyValueCache:
    """Keys and values of every layer for texts of different lengths that end in the same column.

    A text's first column is its start; what stands before it is never written and never attended to.

    Args:
        num_layers, num_kv_heads, head_dim: of the model.
        lengths: tokens of each text to begin with; the longest starts in column 0.
        limit: columns it will ever need.
        dtype: of keys and values.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        lengths: Sequence[int],
        limit: int,
        dtype: torch.dtype,
    ):
        self.end, self.limit = max(lengths), limit
        self.starts = torch.tensor([self.end - length for length in lengths])
        capacity = min(limit, self.end + FIRST_ROOM)
        self.data = torch.zeros(num_layers, 2, len(lengths), num_kv_heads, capacity, head_dim, dtype=dtype)

    @property
    def capacity(self) -> int:
        return self.data.shape[-2]

    def fill(self, layer: int, text: int, keys_values: Tensor) -> None:
        """Write a prompt's keys and values, `(length, 2 * kv_heads, head_dim)`."""
        start = int(self.starts[text])
        rows = keys_values.unflatten(1, (2, -1)).permute(1, 2, 0, 3)  # (2, kv heads, length, head_dim)
        self.data[layer, :, text, :, start : self.end] = rows

    def open_column(self) -> None:
        """Make room for the texts' next tokens."""
        if self.end == self.capacity:
            self._grow()
        self.end += 1

    def last_column(self) -> tuple[Tensor, ...]:
        """Where to write it, for each layer `(2, texts, kv heads, head_dim)`."""
        return self.data[..., self.end - 1, :].unbind()

    def visible(self, window: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Keys and values `(texts, kv heads, columns, head_dim)` of each layer: the last `window`, 0 for all."""
        columns = self.data[..., self._first_visible(window) : self.end, :]
        return columns[:, 0].unbind(), columns[:, 1].unbind()

    def mask(self, window: int) -> Tensor | None:
        """Which of the visible columns each text has, bool `(texts, 1, 1, columns)`; None where all have all."""
        first = self._first_visible(window)
        if int(self.starts.max()) <= first:
            return None
        return (torch.arange(first, self.end) >= self.starts[:, None])[:, None, None]

    def last_places(self) -> tuple[Tensor, Tensor, Tensor]:
        """For the last column, int64 `(texts)` each: the texts, their columns, and their first columns."""
        texts = torch.arange(len(self.starts))
        return texts, torch.full_like(texts, self.end - 1), self.starts

    def positions(self) -> Tensor:
        """The position in its text of each text's last column, int64 `(texts)`."""
        return self.end - 1 - self.starts

    def keep(self, texts: Sequence[int]) -> None:
        """Forget all other texts."""
        index = torch.tensor(texts, dtype=torch.int64)
        self.data, self.starts = self.data.index_select(2, index), self.starts[index]

    def _first_visible(self, window: int) -> int:
        return max(0, self.end - window) if window else 0

    def _grow(self) -> None:
        assert self.end < self.limit, (self.end, self.limit)
        *outer, _, head_dim = self.data.shape
        grown = self.data.new_zeros(*outer, min(self.limit, 2 * self.capacity), head_dim)
        grown[..., : self.end, :] = self.data
        self.data = grown


class CachedDecoder:
    """A causal language model and the texts it is continuing; gradients are never made.

    Args:
        model: one whose `why_not_forward` is None. Its adapters are used as they are now, if they are enabled now.
    """

    def __init__(self, model: "PreTrainedModel"):
        self.model, self.backbone = model, FusedForward(model, "nothing")
        head = loss_head(model)
        assert isinstance(head, LossHead), head
        self.head = head
        described = [_describe(block) for block in self.backbone.blocks]
        self.layers = [_Layer(*pair) for pair in zip(self.backbone.blocks, described, strict=True)]
        self.kernel = _kernel(described, model.base_model.norm, self.head)
        self.windows = {block.window for block in self.backbone.blocks}

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Tensor:
        """Read the prompts; the logits of each one's next token, `(texts, vocabulary)`."""
        lengths = [len(prompt) for prompt in prompts]
        borders = list(itertools.accumulate(lengths, initial=0))
        x, rows = self.backbone.embed(pack_tokens(prompts))
        block = self.backbone.blocks[0]
        limit = max(lengths) + max_new_tokens
        self.cache = KeyValueCache(len(self.layers), block.num_kv_heads, block.head_dim, lengths, limit, x.dtype)

        def attend(layer: int, heads: Tensor) -> Tensor:
            block = self.backbone.blocks[layer]
            for text, (first, last) in enumerate(itertools.pairwise(borders)):
                self.cache.fill(layer, text, heads[first:last, block.num_heads :])
            return block.mix(heads.flatten(1), rows)[0]

        x = self._through_layers(x, rows.cos, rows.sin, attend)
        return self._logits(x[torch.tensor(borders[1:]) - 1])

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each text, int64 `(texts)`; the logits of the next ones, `(texts, vocabulary)`."""
        self.cache.open_column()
        x = self.model.base_model.embed_tokens(tokens)  # (texts, hidden)
        cos, sin = rotary_angles(self.model, self.cache.positions()[:, None])
        if self.kernel and len(tokens) <= FEW_ROWS:
            return self.head.finish(self.kernel.step(x, cos, sin, self.cache.data, *self.cache.last_places()))
        return self._logits(self._through_layers(x, cos, sin, self._attend_to_cache()))

    def _attend_to_cache(self) -> Attend:
        """Attention of one new token of each text."""
        slots = self.cache.last_column()
        visible = {window: self.cache.visible(window) for window in self.windows}
        masks = {window: self.cache.mask(window) for window in self.windows}

        def attend(layer: int, heads: Tensor) -> Tensor:
            block = self.backbone.blocks[layer]
            texts, _, head_dim = heads.shape
            kv_heads = heads[:, block.num_heads :].view(texts, 2, block.num_kv_heads, head_dim)
            slots[layer].copy_(kv_heads.transpose(0, 1))
            # The heads that share a key head stand where attention expects queries of one head.
            queries = heads[:, : block.num_heads].view(texts, block.num_kv_heads, -1, head_dim)
            keys, values = visible[block.window]
            out = F.scaled_dot_product_attention(
                queries, keys[layer], values[layer], masks[block.window], scale=block.scale
            )
            return out.reshape(texts, -1)

        return attend

    def keep(self, texts: Sequence[int]) -> None:
        """Go on with these texts only, in this order."""
        self.cache.keep(texts)

    def _through_layers(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, partial(attend, index))
        return x

    def _logits(self, x: Tensor) -> Tensor:
        if self.kernel and len(x) <= FEW_ROWS:
            return self.head.finish(self.kernel.logits(x))
        return self.head.logits(self.model.base_model.norm(x))


class _Layer:
    """The forward of one decoder block, op by op, on rows whose attention is the caller's.

    Args:
        block: whose products many rows go through.
        described: the same, as few rows see it.
    """

    def __init__(self, block: DecoderBlock, described: DecoderLayer):
        self.block = block
        few = (described.qkv, described.o, described.gate_up, described.down)
        many = (block.qkv, block.o, block.gate_up, block.down)
        self.few_rows: list[Product] = [partial(_few_rows_product, linears) for linears in few]
        self.many_rows: list[Product] = [partial(_many_rows_product, projection) for projection in many]

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """(T, hidden) -> (T, hidden)."""
        block = self.block
        qkv, o, gate_up, down = self.few_rows if x.shape[0] <= FEW_ROWS else self.many_rows
        heads = qkv(_norm(block.input_norm, x)).view(x.shape[0], -1, block.head_dim)
        rotated = heads[:, : block.num_heads + block.num_kv_heads]
        if block.q_norm is not None:
            queries, keys = rotated.split([block.num_heads, block.num_kv_heads], dim=1)
            _norm(block.q_norm, queries, out=queries)
            _norm(block.k_norm, keys, out=keys)
        block_ops.rope_(rotated, cos, sin)
        x = x + o(attend(heads))
        gate, up = gate_up(_norm(block.mlp_norm, x)).chunk(2, dim=1)
        return x + down(block_ops.swiglu(gate, up))


def _norm(norm: Any, x: Tensor, out: Tensor | None = None) -> Tensor:
    return block_ops.rms_norm(x, norm.weight, norm.variance_epsilon, out=out)[0]


def _few_rows_product(linears: Sequence[DecoderLinear], x: Tensor) -> Tensor:
    """(T, in) -> (T, Σ out); packed weights are multiplied as they lie."""
    parts = []
    for each in linears:
        if isinstance(each.weight, QuantizedTensor):
            part = block_ops.gemv_4bit(x, each.weight)
        else:
            part = F.linear(x, each.weight.to(x.dtype))
        if each.bias is not None:
            part += each.bias.to(x.dtype)
        if each.a is not None and each.b is not None:
            part += F.linear(F.linear(x.float(), each.a), each.b)
        parts.append(part)
    return torch.cat(parts, dim=1)


def _many_rows_product(projection: Projection, x: Tensor) -> Tensor:
    adapters = [adapter for adapter in projection.adapters if adapter]
    enabled = any(adapter.enabled for adapter in adapters)
    assert all(adapter.enabled == enabled for adapter in adapters), "adapters are switched on and off together"
    return projection.forward(x, projection.low_rank(x) if enabled else None)


# ---- what the kernel is told ---------------------------------------------------------------------


def _kernel(layers: Sequence[DecoderLayer], norm: Any, head: LossHead) -> DecoderKernel | None:
    """The kernel for few rows, where it knows how to multiply every weight."""
    assert isinstance(head.weight, Tensor), "a streamed model does not generate"
    if head.adapter is not None:  # the kernel's head has none
        return None
    dtype = norm.weight.dtype  # of keys and values
    every = [linear.weight for layer in layers for linear in (*layer.qkv, *layer.o, *layer.gate_up, *layer.down)]
    kinds = {each.spec if isinstance(each, QuantizedTensor) else each.dtype: each for each in (head.weight, *every)}
    if not all(decode_cpu.can_multiply(weight, dtype) for weight in kinds.values()):
        return None
    return DecoderKernel(layers, _describe_norm(norm), DecoderLinear(head.weight, None), dtype)


def _describe(block: DecoderBlock) -> DecoderLayer:
    """A block as it is now: an adapter counts if it is enabled now."""

    def linears(projection: Projection) -> list[DecoderLinear]:
        return [_describe_linear(*each) for each in zip(projection.linears, projection.adapters, strict=True)]

    return DecoderLayer(
        qkv=linears(block.qkv),
        o=linears(block.o),
        gate_up=linears(block.gate_up),
        down=linears(block.down),
        input_norm=_describe_norm(block.input_norm),
        mlp_norm=_describe_norm(block.mlp_norm),
        q_norm=None if block.q_norm is None else _describe_norm(block.q_norm),
        k_norm=None if block.k_norm is None else _describe_norm(block.k_norm),
        num_heads=block.num_heads,
        num_kv_heads=block.num_kv_heads,
        head_dim=block.head_dim,
        window=block.window,
        scale=block.scale,
    )


def _describe_linear(linear: Any, adapter: LoraLinear | None) -> DecoderLinear:
    weight = linear.quantized() if isinstance(linear, QuantizedLinear) else linear.weight.detach()
    bias = None if linear.bias is None else linear.bias.detach()
    if adapter is None or not adapter.enabled:
        return DecoderLinear(weight, bias)
    return DecoderLinear(weight, bias, adapter.lora_A.detach() * adapter.scaling, adapter.lora_B.detach())


def _describe_norm(norm: Any) -> DecoderNorm:
    return DecoderNorm(norm.weight.detach(), norm.variance_epsilon)
