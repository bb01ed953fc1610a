"""Answers token by token through the decoder blocks: the same four-bit weights, and a KV cache.

    prefill   the prompts, packed side by side, through dequantised weights and packed attention
    step      one token of each text; up to FEW_ROWS texts multiply the packed weights as they lie
              (`gemv_4bit`), more share one dequantisation

On one row the arithmetic of an op takes as long as its way through PyTorch's dispatcher and the ops' checks, so a
step calls the kernels' bodies, looked up once, and what does not change from token to token (lists of weights,
stacked A) is put together once. Keys and values of all layers lie in one tensor, so that two calls make the views
of a step. A's and B's products run in fp32: on one row that is faster than bf16, and nothing is rounded.

Left out: a ring buffer for sliding windows; the cache keeps all positions and attention reads the window.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.kernels import registry
from nybble.layers.backbone import BlockBackbone, rotary_angles
from nybble.layers.decoder_block import DecoderBlock, Projection
from nybble.layers.loss_head import LossHead
from nybble.layers.quantized_linear import QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEW_ROWS = 8  # up to which multiplying packed weights beats dequantising them first
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

    def append_column(self) -> tuple[Tensor, ...]:
        """Open the next column; where to write it, for each layer `(2, texts, kv heads, head_dim)`."""
        if self.end == self.capacity:
            self._grow()
        self.end += 1
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

    def positions(self) -> Tensor:
        """The position in its text of each text's last column, int64 `(texts)`."""
        return self.end - 1 - self.starts

    def keep(self, texts: Sequence[int]) -> None:
        """Forget all other texts."""
        self.data, self.starts = self.data[:, :, list(texts)], self.starts[list(texts)]

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
        self.model, self.head = model, LossHead.of(model)
        self.backbone = BlockBackbone(model, "nothing")
        dtype = model.base_model.norm.weight.dtype
        self.layers = [_Layer(block, dtype) for block in self.backbone.blocks]
        self.windows = {block.window for block in self.backbone.blocks}

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Tensor:
        """Read the prompts; the logits of each one's next token, `(texts, vocabulary)`."""
        lengths = [len(prompt) for prompt in prompts]
        borders = list(itertools.accumulate(lengths, initial=0))
        input_ids = torch.tensor([[token for prompt in prompts for token in prompt]])
        position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
        x, rows = self.backbone.embed(input_ids, position_ids, torch.tensor(borders, dtype=torch.int32))
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
        slots = self.cache.append_column()
        visible = {window: self.cache.visible(window) for window in self.windows}
        masks = {window: self.cache.mask(window) for window in self.windows}
        cos, sin = rotary_angles(self.model, self.cache.positions()[None])

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

        return self._logits(self._through_layers(self.model.base_model.embed_tokens(tokens), cos, sin, attend))

    def keep(self, texts: Sequence[int]) -> None:
        """Go on with these texts only, in this order."""
        self.cache.keep(texts)

    def _through_layers(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, partial(attend, index))
        return x

    def _logits(self, x: Tensor) -> Tensor:
        normed = self.model.base_model.norm(x)
        with _without_onednn() if x.shape[0] == 1 else nullcontext():
            return self.head.logits(normed)


@contextmanager
def _without_onednn() -> Iterator[None]:
    """oneDNN takes a bf16 matrix times one row at half the speed of PyTorch's own product."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # a property that torch's stubs do not know
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


class _Layer:
    """The forward of one decoder block on rows whose attention is the caller's."""

    def __init__(self, block: DecoderBlock, dtype: torch.dtype):
        self.block = block
        projections = (block.qkv, block.o, block.gate_up, block.down)
        self.few_rows: list[Product] = [FewRowsProduct(projection, dtype) for projection in projections]
        self.many_rows: list[Product] = [partial(_many_rows_product, projection) for projection in projections]
        self.rms_norm, self.rope, self.swiglu = (_body(op, dtype) for op in ("rms_norm_out", "rope_", "swiglu_out"))

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """(T, hidden) -> (T, hidden)."""
        block = self.block
        qkv, o, gate_up, down = self.few_rows if x.shape[0] <= FEW_ROWS else self.many_rows
        heads = qkv(self._norm(block.input_norm, x)).view(x.shape[0], -1, block.head_dim)
        rotated = heads[:, : block.num_heads + block.num_kv_heads]
        if block.q_norm is not None:
            self._norm(block.q_norm, rotated[:, : block.num_heads], in_place=True)
            self._norm(block.k_norm, rotated[:, block.num_heads :], in_place=True)
        self.rope(rotated, cos, sin, False)
        x = x + o(attend(heads))
        gate, up = gate_up(self._norm(block.mlp_norm, x)).chunk(2, dim=1)
        act = torch.empty(gate.shape, dtype=gate.dtype)
        self.swiglu(gate, up, act)
        return x + down(act)

    def _norm(self, norm: Any, x: Tensor, in_place: bool = False) -> Tensor:
        out = x if in_place else torch.empty_like(x)
        self.rms_norm(x, norm.weight, norm.variance_epsilon, 0.0, out)
        return out


class FewRowsProduct:
    """A projection for up to FEW_ROWS rows: packed weights are multiplied as they lie.

    Args:
        projection: linear layers of one input; adapters count if they are enabled now.
        dtype: of the rows.
    """

    def __init__(self, projection: Projection, dtype: torch.dtype):
        self.products = [_weight_product(linear, dtype) for linear in projection.linears]
        biases = [linear.bias for linear in projection.linears]
        self.biases = [None if bias is None else bias.detach().to(dtype) for bias in biases]
        adapters = [adapter if adapter and adapter.enabled else None for adapter in projection.adapters]
        present = [adapter for adapter in adapters if adapter]
        # The scaling goes into A, which is copied anyway; B is the adapter's own.
        scaled = [adapter.lora_A.detach() * adapter.scaling for adapter in present]
        self.a = torch.cat(scaled) if scaled else None
        self.ranks = [adapter.rank for adapter in present]
        self.b = [adapter.lora_B.detach() if adapter else None for adapter in adapters]

    def __call__(self, x: Tensor) -> Tensor:
        """(T, in) -> (T, out)."""
        parts = [product(x) for product in self.products]
        for part, bias in zip(parts, self.biases, strict=True):
            if bias is not None:
                part += bias
        if self.a is not None:
            low_rank = iter(torch.split_with_sizes(F.linear(x.float(), self.a), self.ranks, dim=1))  # (T, r) of each
            for part, b in zip(parts, self.b, strict=True):
                if b is not None:
                    part += F.linear(next(low_rank), b)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _many_rows_product(projection: Projection, x: Tensor) -> Tensor:
    adapters = [adapter for adapter in projection.adapters if adapter]
    enabled = any(adapter.enabled for adapter in adapters)
    assert all(adapter.enabled == enabled for adapter in adapters), "adapters are switched on and off together"
    return projection.forward(x, projection.low_rank(x) if enabled else None)


def _weight_product(linear: Any, dtype: torch.dtype) -> Product:
    """x -> x · Wᵀ for a few rows, with all but x bound."""
    if not isinstance(linear, QuantizedLinear):
        weight = linear.weight.detach().to(dtype)
        return partial(F.linear, weight=weight)
    q = linear.quantized()
    gemv, spec = _body("gemv_4bit", dtype), q.spec
    return lambda x: gemv(x, q.packed, q.scales, q.shape, spec.format, spec.block_size, spec.double_quant)


def _body(op: str, dtype: torch.dtype) -> registry.Body:
    """What runs an op on CPU rows of `dtype`."""
    return registry.body(op, "cpu", args=(torch.empty(0, dtype=dtype),))
