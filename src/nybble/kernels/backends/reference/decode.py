"""Op by op, each by whichever backend runs it."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels import registry
from nybble.kernels.ops.cached_attention import cached_attention
from nybble.kernels.ops.decode import NO_ROPE, DecoderLayer, DecoderLinear, DecoderModel, DecoderNorm
from nybble.kernels.ops.four_bit import gemv_4bit
from nybble.kernels.ops.glu import geglu, gelu, swiglu
from nybble.kernels.ops.norm import layer_norm, rms_norm
from nybble.kernels.ops.rope import rope_

GATES = {"silu": swiglu, "gelu_pytorch_tanh": geglu}
WIDENED_ROWS = 4096  # of a dense weight of another dtype than the rows it multiplies


@registry.register("decode", "reference")
class OpByOp:
    """A `Decoder`. Between products rows are in their own dtype; products of adapters are in fp32."""

    def __init__(self, model: DecoderModel):
        self.model = model

    def step(
        self,
        x: Tensor,
        cos: Sequence[Tensor],
        sin: Sequence[Tensor],
        cache: Sequence[Tensor],
        texts: Tensor,
        columns: Tensor,
        starts: Tensor,
        inputs: Tensor | None = None,
    ) -> Tensor:
        written: list[Tensor] = []  # of each layer, heads as they are put into the cache
        for i, (layer, keys_values) in enumerate(zip(self.model.layers, cache, strict=True)):
            heads = _heads(layer, x, cos, sin, written)
            written.append(heads)
            x = _through_layer(layer, x, heads, (keys_values, texts, columns, starts))
            if layer.own_input is not None and inputs is not None:
                act = GATES[layer.activation](_product(layer.own_input.gate, x), inputs[:, i])
                x = x + _norm(layer.own_input.norm, _product(layer.own_input.project, act))
            x = x if layer.factor == 1.0 else x * layer.factor
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        return _product([self.model.head], _norm(self.model.norm, x)).float()


def _heads(
    layer: DecoderLayer, x: Tensor, cos: Sequence[Tensor], sin: Sequence[Tensor], before: Sequence[Tensor]
) -> Tensor:
    """Queries, keys and values of rows (T, hidden), normed and turned, (T, heads, head_dim).

    Args:
        cos, sin: of each kind of layers.
        before: the same of the layers before.
    """
    heads = _product(layer.qkv, _norm(layer.input_norm, x)).view(x.shape[0], -1, layer.head_dim)
    if layer.reads_keys is not None:
        heads = torch.cat([heads, before[layer.reads_keys][:, -2 * layer.num_kv_heads :]], dim=1)
    elif layer.values_are_keys:
        heads = torch.cat([heads, heads[:, layer.num_heads :]], dim=1)
    queries, keys, values = heads.split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], dim=1)
    made = ((layer.q_norm, queries), (layer.k_norm, keys), (layer.v_norm, values))
    turned = ((layer.query_rope, queries), (layer.rope, keys))
    computed = 3 if layer.reads_keys is None else 1  # what it reads is ready
    for norm, part in made[:computed]:
        if norm is not None:
            seen = part if norm.weight.shape[-1] == layer.head_dim else part.view(len(part), -1)
            _norm(norm, seen, out=seen)
    for rope, part in turned[:computed]:
        if rope != NO_ROPE:
            rope_(part, cos[rope], sin[rope], layer.neighbours)
    return heads


def _through_layer(layer: DecoderLayer, x: Tensor, heads: Tensor, where: tuple[Tensor, ...]) -> Tensor:
    """(T, hidden) -> (T, hidden); `where`: the layer's cache, and the rows' texts, columns and starts."""
    attended = cached_attention(heads, *where, scale=layer.scale, window=layer.window, softcap=layer.softcap)
    x2 = x.add(_norm(layer.attention_output_norm, _product(layer.o, attended)), alpha=layer.residual)
    inner = _product(layer.gate_up, _norm(layer.mlp_norm, x if layer.parallel else x2))
    act = GATES[layer.activation](*inner.chunk(2, dim=1)) if layer.gated else gelu(inner)
    return x2.add(_norm(layer.mlp_output_norm, _product(layer.down, act)), alpha=layer.residual)


def _norm(norm: DecoderNorm | None, x: Tensor, out: Tensor | None = None) -> Tensor:
    """The normed rows; they themselves where there is no norm."""
    if norm is None:
        return x
    if norm.weight.dim() == 2:
        out = torch.empty_like(x) if out is None else out
        for i, weight in enumerate(norm.weight):
            _norm(replace(norm, weight=weight), x[:, i], out=out[:, i])
        return out
    if norm.centred:
        return layer_norm(x, norm.weight, norm.bias, norm.eps, out=out)[0]
    return rms_norm(x, norm.weight, norm.eps, out=out)[0]


def _product(linears: Sequence[DecoderLinear], x: Tensor) -> Tensor:
    """(T, in) -> (T, Σ out); packed weights are multiplied as they lie."""
    parts = []
    for each in linears:
        part = gemv_4bit(x, each.weight) if isinstance(each.weight, QuantizedTensor) else _dense(x, each.weight)
        if each.bias is not None:
            part += each.bias.to(x.dtype)
        if each.a is not None and each.b is not None:
            part += F.linear(F.linear(x.float(), each.a), each.b)
        parts.append(part)
    return torch.cat(parts, dim=1)


def _dense(x: Tensor, weight: Tensor) -> Tensor:
    if weight.dtype == x.dtype:
        return F.linear(x, weight)
    return torch.cat([F.linear(x, rows.to(x.dtype)) for rows in weight.split(WIDENED_ROWS)], dim=1)
