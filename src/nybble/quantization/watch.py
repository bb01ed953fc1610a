"""What layers are given and what they make of it, seen from outside while a model computes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

See = Callable[[str, nn.Module, Any, Tensor], None]  # (name, layer, what it was given, what it made of it)


@contextmanager
def watched(layers: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Within the block, `see` is called each time that one of the layers has computed.

    Args:
        layers: by the name that `see` is told; each is called with one thing.
    """

    def after(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda layer, inputs, output: see(name, layer, inputs[0], output)

    handles = [layer.register_forward_hook(after(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
