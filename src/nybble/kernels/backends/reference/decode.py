"""Op by op, each by whichever backend runs it."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels import registry
from nybble.kernels.ops.decode import DecoderLinear, DecoderModel, attend_to_cache, norm_rows, through_layer
from nybble.kernels.ops.four_bit import gemv_4bit

WIDENED_ROWS = 4096  # of a dense weight of another dtype than the rows it multiplies


@registry.register("decode", "reference")
class OpByOp:
    """A `Decoder`. Between products rows are in their own dtype; products of adapters are in fp32."""

    def __init__(self, model: DecoderModel):
        self.model = model
        self._products = [[partial(_product, each) for each in layer.projections] for layer in model.layers]

    def step(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, texts: Tensor, columns: Tensor, starts: Tensor
    ) -> Tensor:
        layers = self.model.layers
        attends = attend_to_cache(layers, cache, texts, columns, starts)
        for layer, products, attend in zip(layers, self._products, attends, strict=True):
            x = through_layer(layer, products, x, cos, sin, attend)
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        return _product([self.model.head], norm_rows(self.model.norm, x)).float()


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
