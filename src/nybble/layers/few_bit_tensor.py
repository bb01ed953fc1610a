"""FewBitTensor: what a parameter in few bits does in the place of a dense one, whatever its bytes stand for.

A tensor subclass (`__torch_function__`, `__torch_dispatch__`; https://docs.pytorch.org/docs/stable/notes/extending.html)
of the logical shape. What is asked of it is asked of the dense values, which are made anew each time; what is written
into it is rounded to its format again.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from nybble.errors import ConfigError, FormatError
from nybble.formats.quantized_stack import QuantizedStack
from nybble.formats.quantized_tensor import QuantizedTensor

aten = torch.ops.aten
ROUNDED_AGAIN = (
    "An adapter is merged into, or taken out of, a base in {format}: the sum is rounded to {format} again, so that "
    "answers change a little, and unmerging does not bring back the bytes there were. For a merge without that loss "
    "save the adapter and use `nybble merge`."
)
_TAKES_VALUES = (aten.copy_.default, aten.set_.source_Tensor)
_ASKS_FOR_GRADIENTS = (torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]


class FewBitTensor(torch.Tensor):
    """A frozen parameter in few bits; a subclass says what its bytes `q` are."""

    q: Any

    @property
    def packed(self) -> Tensor:
        packed: Tensor = self.q.packed
        return packed

    @property
    def scales(self) -> Tensor:
        scales: Tensor = self.q.scales
        return scales

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values, a plain tensor."""
        raise NotImplementedError

    def over(self, q: Any, dtype: torch.dtype) -> Self:
        """Another of its kind over these bytes, which shows this dtype."""
        raise NotImplementedError

    def rounded(self, values: Tensor) -> Any:
        """Dense values in its format, as `q` is."""
        raise NotImplementedError

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, {self.q.spec.format})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied: Self | None = memo.get(id(self))
        if copied is None:
            copied = self.over(_copied(self.q), self.dtype)
            copied.__dict__.update({name: value for name, value in self.__dict__.items() if name != "q"})
            memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What would make it learn, or give it other values; all else goes to `__torch_dispatch__`."""
        kwargs = kwargs or {}
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
            return first.over(first.q, first.dtype)
        if func is aten.clone.default:
            return first.over(_copied(first.q), first.dtype)
        if func is aten._to_copy.default:
            device = kwargs.get("device")
            q = _copied(first.q) if device is None else first.q.to(device)
            return first.over(q, kwargs.get("dtype") or first.dtype)
        if func in _TAKES_VALUES and all(isinstance(each, FewBitTensor) for each in args[:2]):
            return first.take_over(args[1].q)
        dense_args, dense_kwargs = tree_map_only(FewBitTensor, lambda each: each.dense(), (tuple(args), kwargs))
        if not func._schema.is_mutable:
            return func(*dense_args, **dense_kwargs)
        if not isinstance(first, FewBitTensor):
            assert all(not isinstance(each, FewBitTensor) for each in kwargs.values()), f"{func} writes into a weight"
            return func(*dense_args, **dense_kwargs)
        func(*dense_args, **dense_kwargs)
        return first.take_over(_rounded(first, dense_args[0]))

    def take_over(self, q: QuantizedTensor | QuantizedStack) -> Self:
        """Copy the bytes of another weight into its own."""
        if q.spec != self.q.spec:
            raise FormatError(f"A weight in {self.q.spec} is to take one in {q.spec}.", "Both must be in one format.")
        self.q.packed.copy_(q.packed)
        self.q.scales.copy_(q.scales)
        return self


def _set_data(weight: FewBitTensor, values: Tensor) -> None:
    """`weight.data = values`: the bytes of another such weight are taken over, others are rounded."""
    if not isinstance(values, FewBitTensor):
        values = weight.over(_rounded(weight, values), values.dtype)
    with torch._C.DisableTorchFunctionSubclass():
        torch.Tensor.data.__set__(weight, values)  # type: ignore[attr-defined]
    weight.q = values.q


def _rounded(weight: FewBitTensor, values: Tensor) -> Any:
    assert values.shape == weight.shape, (values.shape, weight.shape)
    warnings.warn(ROUNDED_AGAIN.format(format=weight.q.spec.format), stacklevel=2)
    return weight.rounded(values)


def _copied(q: Any) -> Any:
    return replace(q, packed=q.packed.clone(), scales=q.scales.clone())
