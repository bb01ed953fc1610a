"""A graph that does on a CPU what one does on a card: it replays ops on the very memory that they had when they were
recorded, with the numbers that the host gave them then. What a capture forbids raises.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from nybble.memory.graph import Graph

# They look at values, take what lies in the host's memory, or draw what a replay would have to draw anew.
TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)
FORBIDDEN = {"lift_fresh", "lift_fresh_copy", "is_nonzero"}
UNWRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Forbidden(Exception):
    """What a capture on a card would not have allowed."""


class RecordedGraph(Graph):
    """As `CudaGraph`: the first call runs the function, the second records it, from then on it is replayed.

    Memory that was there before is not held, but for what the graph says that it uses: where its owner has replaced it,
    a replay raises. Memory of the recording is rubbish as soon as another graph runs, and where an op leaves it
    unwritten.
    """

    def __init__(self, function: Callable[[], Tensor], uses: Callable[[], Sequence[Tensor]] = tuple):
        super().__init__(function, uses)
        self.runs = self.replays = 0
        self._recording = Recording()
        ALL.add(self)

    def __call__(self) -> Tensor:
        self.runs += 1
        for graph in ALL:
            if graph is not self:
                graph._recording.spoil()
        if self.runs == 1:
            return self._function()
        if self.runs == 2:
            with self._recording:
                self._result = self._function()
            self._kept = self._uses()
        else:
            self._recording.replay()
            self.replays += 1
        return self._result


class KeptGraph(RecordedGraph):
    """It stays in `made`, to be asked."""

    made: ClassVar[list[RecordedGraph]] = []

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.made.append(self)


ALL: weakref.WeakSet[RecordedGraph] = weakref.WeakSet()


class Recording(TorchDispatchMode):
    """Ops as PyTorch dispatches them; nybble's own are whole ones, as a kernel is to a graph."""

    def __init__(self) -> None:
        super().__init__()
        self._ops: list[tuple[Any, Any, Any, Any]] = []
        self._own: dict[int, Tensor] = {}  # by its storage: memory that was allocated meanwhile

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        refuse(function, arguments)
        before = {key_of(each) for each in tree_leaves((arguments, keywords)) if isinstance(each, Tensor)}
        result = function(*arguments, **keywords)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and key_of(tensor) not in before:
                self._own[key_of(tensor)] = tensor
        self._ops.append((function, *(tree_map(self._held, each) for each in (arguments, keywords, result))))
        return result

    def _held(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach() if key_of(value) in self._own else Place(value)

    def spoil(self) -> None:
        """Fill the recording's memory with what another graph might leave there."""
        for tensor in self._own.values():
            rubbish(tensor)

    def replay(self) -> None:
        self.spoil()
        with torch.no_grad():
            for function, *recorded in self._ops:
                arguments, keywords, outputs = tree_map(found, tuple(recorded))
                if function.overloadpacket.__name__ in UNWRITTEN:
                    rubbish(outputs)
                    continue
                results = function(*arguments, **keywords)
                for output, result in zip(tree_leaves(outputs), tree_leaves(results), strict=True):
                    if isinstance(output, Tensor) and key_of(output) != key_of(result):
                        output.copy_(result)


class Place:
    """Where a tensor lies in memory that the graph does not hold."""

    def __init__(self, tensor: Tensor):
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._view = tensor.storage_offset(), tensor.shape, tensor.stride()
        self._dtype = tensor.dtype

    def tensor(self) -> Tensor:
        if self._storage.expired():
            raise Forbidden("a replay uses memory that was given back")
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._view)


def found(value: Any) -> Any:
    return value.tensor() if isinstance(value, Place) else value


def key_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def rubbish(tensor: Tensor) -> None:
    storage = tensor.untyped_storage()
    torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,)).fill_(255)  # NaN in floating point


def refuse(function: Any, arguments: Any) -> None:
    name = function.overloadpacket.__name__
    masks = [each for each in tree_leaves(arguments) if isinstance(each, Tensor) and each.dtype == torch.bool]
    if name in FORBIDDEN or any(tag in function.tags for tag in TAGS) or (name.startswith("index") and masks):
        raise Forbidden(f"{function} cannot be captured")
