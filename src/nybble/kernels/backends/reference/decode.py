"""Op by op, each by whichever backend runs it."""

from collections.abc import Sequence

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
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, texts: Tensor, columns: Tensor, starts: Tensor
    ) -> Tensor:
        for layer, keys_values in zip(self.model.layers, cache, strict=True):
            where = (keys_values, texts, columns, starts)
            x = _through_layer(layer, x, cos, sin, where)
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        return _product([self.model.head], _norm(self.model.norm, x)).float()


def _through_layer(layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, where: tuple[Tensor, ...]) -> Tensor:
    """(T, hidden) -> (T, hidden); `cos`, `sin`: of each kind of layer; `where`: the layer's cache, and the rows' texts,
    columns and starts.
    """
    heads = _product(layer.qkv, _norm(layer.input_norm, x)).view(x.shape[0], -1, layer.head_dim)
    queries, keys = heads.split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], dim=1)[:2]
    for norm, part in ((layer.q_norm, queries), (layer.k_norm, keys)):
        if norm is not None:
            seen = part if len(norm.weight) == layer.head_dim else part.view(len(part), -1)
            _norm(norm, seen, out=seen)
    for rope, part in ((layer.query_rope, queries), (layer.rope, keys)):
        if rope != NO_ROPE:
            rope_(part, cos[rope], sin[rope], layer.neighbours)
    attended = cached_attention(heads, *where, scale=layer.scale, window=layer.window, softcap=layer.softcap)
    x2 = x.add(_norm(layer.attention_output_norm, _product(layer.o, attended)), alpha=layer.residual)
    inner = _product(layer.gate_up, _norm(layer.mlp_norm, x if layer.parallel else x2))
    act = GATES[layer.activation](*inner.chunk(2, dim=1)) if layer.gated else gelu(inner)
    return x2.add(_norm(layer.mlp_output_norm, _product(layer.down, act)), alpha=layer.residual)


def _norm(norm: DecoderNorm | None, x: Tensor, out: Tensor | None = None) -> Tensor:
    """The normed rows; they themselves where there is no norm."""
    if norm is None:
        return x
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
