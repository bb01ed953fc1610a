"""QuantizedWeight: a weight in few bits that other libraries take for a matrix of its logical shape.

A tensor subclass (`__torch_function__`, `__torch_dispatch__`; https://docs.pytorch.org/docs/stable/notes/extending.html)
that stands in the `weight` of a plain `nn.Linear`. A product makes the dense weight anew in forward and in backward, as
`QuantizedLinear` does; whatever else is asked of it is asked of the dense weight. What is written into it is rounded to
its format again.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nybble.errors import ConfigError, FormatError
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels.ops.four_bit import dequantize, quantize
from nybble.layers.streamed import FrozenProduct

aten = torch.ops.aten
ROUNDED_AGAIN = (
    "An adapter is merged into, or taken out of, a base in {format}: the sum is rounded to {format} again, so that "
    "answers change a little, and unmerging does not bring back the bytes there were. For a merge without that loss "
    "save the adapter and use `nybble merge`."
)


class QuantizedWeight(torch.Tensor):
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

    @property
    def packed(self) -> Tensor:
        return self.q.packed

    @property
    def scales(self) -> Tensor:
        return self.q.scales

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values, a plain tensor."""
        return dequantize(self.q, dtype or self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, {self.q.spec.format})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedWeight":
        copied = memo.get(id(self))
        if copied is None:
            copied = QuantizedWeight(_copied(self.q), self.dtype)
            copied.__dict__.update({name: value for name, value in self.__dict__.items() if name != "q"})
            memo[id(self)] = copied
        return copied

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
        """A product with it, and what would make it learn; all else goes to `__torch_dispatch__`."""
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            return _set_data(*args)
        if func in _ASKS_FOR_GRADIENTS and (args[1:] or tuple(kwargs.values()) or (True,))[0]:
            raise ConfigError(
                f"A weight in {args[0].q.spec.format} is asked to learn.",
                "Weights in few bits are frozen; adapters beside them learn.",
                "Leave it out of modules_to_save, or name its module in skip_modules, which stay in 16 bits.",
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        first: Any = args[0] if args else None
        if func in (aten.detach.default, aten.alias.default):
            return QuantizedWeight(first.q, first.dtype)
        if func is aten.clone.default:
            return QuantizedWeight(_copied(first.q), first.dtype)
        if func is aten._to_copy.default:
            device = kwargs.get("device")
            q = _copied(first.q) if device is None else first.q.to(device)
            return QuantizedWeight(q, kwargs.get("dtype") or first.dtype)
        if func is aten.copy_.default and all(isinstance(each, QuantizedWeight) for each in args[:2]):
            return first.take_over(args[1].q)
        dense_args, dense_kwargs = tree_map_only(QuantizedWeight, QuantizedWeight.dense, (tuple(args), kwargs))
        if not func._schema.is_mutable:
            return func(*dense_args, **dense_kwargs)
        if not isinstance(first, QuantizedWeight):
            assert all(not isinstance(each, QuantizedWeight) for each in kwargs.values()), (
                f"{func} writes into a weight"
            )
            return func(*dense_args, **dense_kwargs)
        func(*dense_args, **dense_kwargs)
        return first.take_over(_rounded(dense_args[0], first.q))

    def take_over(self, q: QuantizedTensor) -> "QuantizedWeight":
        """Copy the bytes of another weight into its own."""
        if q.spec != self.q.spec:
            raise FormatError(f"A weight in {self.q.spec} is to take one in {q.spec}.", "Both must be in one format.")
        self.q.packed.copy_(q.packed)
        self.q.scales.copy_(q.scales)
        return self


_ASKS_FOR_GRADIENTS = (torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]


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


def _set_data(weight: QuantizedWeight, values: Tensor) -> None:
    """`weight.data = values`: the bytes of another such weight are taken over, others are rounded."""
    if not isinstance(values, QuantizedWeight):
        values = QuantizedWeight(_rounded(values, weight.q), values.dtype)
    with torch._C.DisableTorchFunctionSubclass():
        torch.Tensor.data.__set__(weight, values)  # type: ignore[attr-defined]
    weight.q = values.q


def _rounded(values: Tensor, like: QuantizedTensor) -> QuantizedTensor:
    assert values.shape == like.shape, (values.shape, like.shape)
    warnings.warn(ROUNDED_AGAIN.format(format=like.spec.format), stacklevel=2)
    return replace(quantize(values, like.spec), dtype=like.dtype)


def _copied(q: QuantizedTensor) -> QuantizedTensor:
    return replace(q, packed=q.packed.clone(), scales=q.scales.clone())
