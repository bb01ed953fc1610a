"""QuantizedWeight: a weight in few bits that other libraries take for a matrix of its logical shape.

It stands in the `weight` of a plain `nn.Linear`. A product makes the dense weight anew in forward and in backward, as
`QuantizedLinear` does; all else is as `FewBitTensor` says.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels.ops.four_bit import dequantize, quantize
from nybble.layers.few_bit_tensor import FewBitTensor
from nybble.layers.streamed import FrozenProduct


class QuantizedWeight(FewBitTensor):
    """A frozen matrix `[out_features, in_features]` in few bits.

    Args:
        q: its bytes; nothing is copied.
        dtype: that it shows, and that its dense values have where nothing says otherwise.
    """

    q: QuantizedTensor

    @staticmethod
    def __new__(cls, q: QuantizedTensor, dtype: torch.dtype) -> "QuantizedWeight":
        return torch.Tensor._make_wrapper_subclass(
            cls, q.shape, dtype=dtype, device=q.packed.device, requires_grad=False
        )

    def __init__(self, q: QuantizedTensor, dtype: torch.dtype):
        self.q = q

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """As `FewBitTensor` says."""
        return dequantize(self.q, dtype or self.dtype)

    def over(self, q: QuantizedTensor, dtype: torch.dtype) -> "QuantizedWeight":
        """As `FewBitTensor` says."""
        return QuantizedWeight(q, dtype)

    def rounded(self, values: Tensor) -> QuantizedTensor:
        """As `FewBitTensor` says."""
        return replace(quantize(values, self.q.spec), dtype=self.q.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return ["packed", "scales"], (self.q.spec, self.q.shape, self.q.dtype, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        parts: Mapping[str, Tensor], facts: tuple[Any, ...], size: Any, stride: Any
    ) -> "QuantizedWeight":
        spec, shape, source_dtype, dtype = facts
        return QuantizedWeight(QuantizedTensor(parts["packed"], parts["scales"], spec, shape, source_dtype), dtype)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """A product with it; all else as `FewBitTensor` says."""
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def frozen_parameter(q: QuantizedTensor, dtype: torch.dtype) -> nn.Parameter:
    """A weight in few bits as the parameter of a module; it does not learn."""
    return nn.Parameter(QuantizedWeight(q, dtype), requires_grad=False)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · Wᵀ + bias, `(..., in)` -> `(..., out)`, in the dtype of x, or in autocast's."""
    assert isinstance(weight, QuantizedWeight), "a weight in few bits is multiplied with, and not by another"
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y: Tensor = FrozenProduct.apply(x, weight.dense)
    return y if bias is None else y + bias.to(y.dtype)
