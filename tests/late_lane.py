"""A lane, and a card at its end, that take every liberty events leave them: on a CPU, and the same in each run."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from nybble.memory.lane import Lane

RUBBISH = 255  # of such bytes every floating-point number is NaN
Late = Literal["copies", "kernels", "both"]
Forgotten = Literal["nothing", "wait", "after", "staging"]
Task = tuple["Moment | None", Callable[[], object]]  # what it comes after, and what it does
LOCK = threading.RLock()


@dataclass
class Stream:
    """Tasks in their order, done only as far as somebody waits for them; if `eager`, at once."""

    eager: bool
    tasks: deque[Task] = field(default_factory=deque)
    asked: int = 0
    done: int = 0

    def add(self, after: "Moment | None", task: Callable[[], object]) -> "Moment":
        with LOCK:
            self.tasks.append((after, task))
            self.asked += 1
            added = self.now()
            if self.eager:
                added.synchronize()
            return added

    def now(self) -> "Moment":
        return Moment(self, self.asked)


@dataclass(frozen=True)
class Moment:
    """An event: how many of a stream's tasks come before it."""

    stream: Stream
    after: int

    def synchronize(self) -> None:
        with LOCK:
            while self.stream.done < self.after:
                after, task = self.stream.tasks[0]
                if after is not None:
                    after.synchronize()
                task()
                self.stream.tasks.popleft()  # and with it what it held
                self.stream.done += 1


class LateLane(Lane):
    """What is copied is rubbish until its copy was waited for, and so is what comes of memory that was given back
    before. Memory of the device is still written by its former owner when it is handed out.

    Args:
        late: what is done as late as can be, the other as soon: copies, or the kernels that `compute` is given.
        forget: what is left out, to see that it is missed: that computing waits for copies, that copies come after
            computing, or that the host waits for copies before it uses the memory that files go through.
    """

    def __init__(self, late: Late = "copies", forget: Forgotten = "nothing"):
        super().__init__(torch.device("cpu"))
        self.kernels, self.copies = Stream(eager=late == "copies"), Stream(eager=late == "kernels")
        self._forget = forget

    def compute(self, kernel: Callable[[], object]) -> None:
        self.kernels.add(None, kernel)

    def finish(self) -> None:
        """Compute and copy all that was asked for."""
        self.kernels.now().synchronize()
        self.copies.now().synchronize()

    def host_memory(self, num_bytes: int) -> Tensor:
        return torch.full((num_bytes,), RUBBISH, dtype=torch.uint8)

    def device_memory(self, num_bytes: int) -> Tensor:
        memory = torch.full((num_bytes,), RUBBISH, dtype=torch.uint8)
        place = _Place(memory)
        self.compute(place.spoil)
        return memory

    def mark(self) -> Moment:
        return self.kernels.now()

    def wait(self, event: Moment) -> None:
        if self._forget != "wait":
            self.kernels.add(event, lambda: None)

    def copy(self, source: Tensor, target: Tensor, after: Moment) -> Moment:
        if self._forget == "after":
            after = Moment(after.stream, 0)
        origin, goal = _Place(source), _Place(target)
        if self.kernels.eager:  # who looks now has not waited
            goal.spoil()
        # Memory that is given back is handed out to kernels asked for later: a card that lags has not come to those.
        held = None if self.kernels.eager else (source, target)
        return self.copies.add(after, lambda held=held: goal.take(origin))

    def fill(self, target: Tensor, read: Callable[[Tensor], None], after: Moment) -> Moment:
        if self._forget == "staging":
            self._staged = None
        return super().fill(target, read, after)

    def drain(self, source: Tensor, write: Callable[[Tensor], None], after: Moment) -> None:
        if self._forget != "staging":
            return super().drain(source, write, after)
        host = self._stage(len(source))
        self.copy(source, host, after)
        write(host)


class _Place:
    """Where a tensor lies, without keeping it there."""

    def __init__(self, tensor: Tensor):
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._view = tensor.storage_offset(), tensor.shape, tensor.stride()
        self._dtype = tensor.dtype

    def tensor(self) -> Tensor | None:
        """The tensor, None where its memory was given back."""
        if self._storage.expired():
            return None
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._view)

    def spoil(self) -> None:
        tensor = self.tensor()
        if tensor is not None:
            tensor.copy_(torch.full((tensor.nbytes,), RUBBISH, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape))

    def take(self, origin: "_Place") -> None:
        source, target = origin.tensor(), self.tensor()
        assert target is not None, "copied into memory that was given back"
        if source is None:
            self.spoil()
        else:
            target.copy_(source)
