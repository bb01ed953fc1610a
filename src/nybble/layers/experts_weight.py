"""ExpertsWeight: one projection of all experts in few bits, where transformers and PEFT have a parameter.

PEFT puts adapters on such a parameter by `torch.baddbmm(W, lhs, rhs, alpha=s)`, as torch's parametrization of it, for
each call of the module (`target_parameters`). Of an ExpertsWeight that is W with its two factors beside it: what
multiplies tokens with experts (`experts_forward`) takes the factors for each expert that has tokens, and no dense stack
is made. Whoever asks for more gets the dense sum, with gradients for the factors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nybble.formats.quantized_stack import QuantizedStack
from nybble.kernels.ops.four_bit import dequantize, quantize
from nybble.layers.few_bit_tensor import FewBitTensor

_FACTS = tuple(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "requires_grad", "ndim"))


class Factors(NamedTuple):
    """What is added to each expert's matrix: scaling · b · a.

    Args:
        a: (E, r, in).
        b: (E, out, r).
    """

    a: Tensor
    b: Tensor
    scaling: float


class ExpertsWeight(FewBitTensor):
    """E frozen matrices in few bits: `[E, out, in]`, or `[E, in, out]` where the module has them turned.

    Args:
        q: their bytes, each matrix `[out, in]`; nothing is copied.
        dtype: that it shows, and that its dense values have where nothing says otherwise.
        transposed: the module has them turned.
        added: what is to be added to them.
    """

    q: QuantizedStack

    @staticmethod
    def __new__(
        cls, q: QuantizedStack, dtype: torch.dtype, transposed: bool = False, added: Factors | None = None
    ) -> "ExpertsWeight":
        shape = (len(q), *(q.shape[::-1] if transposed else q.shape))
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=q.packed.device, requires_grad=False)

    def __init__(self, q: QuantizedStack, dtype: torch.dtype, transposed: bool = False, added: Factors | None = None):
        self.q, self.transposed, self.added = q, transposed, added

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """As `FewBitTensor` says, without what is to be added."""
        values = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.q.packed.device)
        for index, matrix in enumerate(values):
            wide = dequantize(self.q.matrix(index), values.dtype)
            matrix.copy_(wide.T if self.transposed else wide)
        return values

    def over(self, q: QuantizedStack, dtype: torch.dtype) -> "ExpertsWeight":
        """As `FewBitTensor` says."""
        return ExpertsWeight(q, dtype, self.transposed)

    def rounded(self, values: Tensor) -> QuantizedStack:
        """As `FewBitTensor` says."""
        matrices = (quantize(each.T if self.transposed else each, self.q.spec) for each in values)
        return replace(QuantizedStack.of(matrices, len(self.q)), dtype=self.q.dtype)

    def plus(self, lhs: Tensor, rhs: Tensor, alpha: float) -> "ExpertsWeight":
        """With alpha · lhs · rhs of each expert beside it, as its module has the matrices."""
        a, b = (lhs.mT, rhs.mT) if self.transposed else (rhs, lhs)
        return ExpertsWeight(self.q, self.dtype, self.transposed, Factors(a, b, alpha))

    def summed(self) -> Tensor:
        """The dense sum with what is to be added, with gradients for that; itself where nothing is."""
        if self.added is None:
            return self
        a, b, scaling = self.added
        lhs, rhs = (a.mT, b.mT) if self.transposed else (b, a)
        return torch.baddbmm(self.dense(), lhs, rhs, alpha=scaling)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What PEFT adds; all else as `FewBitTensor` says, of the sum where something was added."""
        kwargs = kwargs or {}
        if func is torch.baddbmm and kwargs.keys() == {"alpha"} and not getattr(args[0], "added", True):
            return args[0].plus(*args[1:], **kwargs)
        if func not in _FACTS:
            args, kwargs = tree_map_only(ExpertsWeight, ExpertsWeight.summed, (tuple(args), dict(kwargs)))
        return super().__torch_function__(func, types, args, kwargs)


def frozen_experts(q: QuantizedStack, dtype: torch.dtype, transposed: bool) -> nn.Parameter:
    """Experts in few bits as the parameter of a module; they do not learn."""
    return nn.Parameter(ExpertsWeight(q, dtype, transposed), requires_grad=False)
