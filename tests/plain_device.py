"""The CPU as a GPU that has only PyTorch: Intel's or Apple's."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nybble.kernels import hardware, registry
from nybble.sizes import SHAPE_RULES


class WithoutDoubles(TorchDispatchMode):
    """Finds fp64 tensors."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                assert tensor.dtype != torch.float64, function
        return result


def as_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without fp64, with plain bodies alone and none of nybble's decoder blocks."""
    monkeypatch.setattr(hardware, "WITHOUT_DOUBLES", {"cpu"})
    monkeypatch.setitem(registry.PREFERENCE, "cpu", ("reference",))
    monkeypatch.setattr(registry, "PLAIN_BLOCKS", ())
    monkeypatch.setitem(SHAPE_RULES, "cpu", SHAPE_RULES["mps"])
