"""Graphs: what a function asks a device for, captured once and asked for again as one launch.

A GPU computes quicker on few rows than its host can ask it to. A graph keeps all that was asked for: the kernels, the
numbers that the host gave them, and the addresses of what they read and wrote. A replay does the same once more, so
what shall differ must lie in memory that the function only reads, and be written there before; nothing may wait for the
device, come from the host's memory or depend in its shape on values; and memory that was there before the capture must
stay, though its owner may want to replace it. What was allocated meanwhile lies in a pool that all graphs share: it is
valid until another one runs.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Graph(ABC):
    """A function that is run again and again; each call runs it once.

    Args:
        function: without arguments; its result is valid until a graph runs next.
        uses: after a run, buffers of others that it works in; they are kept as long as the graph.
    """

    def __init__(self, function: Callable[[], Tensor], uses: Callable[[], Sequence[Tensor]] = tuple):
        self._function, self._uses = function, uses

    @abstractmethod
    def __call__(self) -> Tensor:
        """Run it."""


class CudaGraph(Graph):
    """On a GPU: the first call runs the function, so that kernels are compiled and loaded and buffers are there; the
    second captures it; from then on it is replayed. Never run on a card so far.
    """

    def __init__(self, function: Callable[[], Tensor], uses: Callable[[], Sequence[Tensor]] = tuple):
        super().__init__(function, uses)
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result = torch.empty(0)
        self._kept: Sequence[Tensor] = ()

    def __call__(self) -> Tensor:
        if not self._warm:
            return self._first_run()
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        self._graph.replay()
        return self._result

    def _first_run(self) -> Tensor:
        """On the stream that captures: what libraries keep for each stream is then there."""
        stream, _ = _stream_and_pool(torch.cuda.current_device())
        here = torch.cuda.current_stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            result = self._function()
        here.wait_stream(stream)
        result.record_stream(here)
        self._warm = True
        return result

    def _capture(self) -> None:
        stream, pool = _stream_and_pool(torch.cuda.current_device())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            self._result = self._function()
        self._graph, self._kept = graph, self._uses()


@functools.cache
def _stream_and_pool(device: int) -> tuple[torch.cuda.Stream, Any]:
    """Of all graphs of a device: sharing a pool asks for one stream (`torch.cuda.graph`)."""
    return torch.cuda.Stream(device), torch.cuda.graph_pool_handle()


GRAPHS: dict[str, type[Graph]] = {"cuda": CudaGraph}  # kinds of devices whose host is slower than they are


def graph_on(device: torch.device) -> type[Graph] | None:
    """What replays functions on a device; None where it is not worth anything, and they are just run."""
    return GRAPHS.get(device.type)
