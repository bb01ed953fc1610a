"""Forward and backward pass of a micro-batch, from a graph where the device is quicker than its host (memory/graph.py).

A graph fits batches of one shape, so those of few tokens are filled up to few shapes: tokens and supervised ones to
multiples, the longest document and the number of documents to powers of two. They are filled up whether there is a
graph for them or not, and a graph computes what is computed without: no number depends on it. The first shapes that
come twice get one.

Padded micro-batches are of as many lengths as rows are. Each new one leaves gaps in the C library's heap, which is
trimmed every few micro-batches: without it memory grows for a hundred steps, by a third.
"""

from collections import Counter
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nybble.data.packing import Batch, fill_up
from nybble.kernels.hardware import wide_dtype
from nybble.kernels.heap import lies_in_heap, trim_heap
from nybble.layers.backbone import FusedForward
from nybble.layers.batch_model import BatchModel
from nybble.layers.causal_lm import CausalLM
from nybble.layers.loss_head import Denominator, LossHead
from nybble.memory.graph import Graph, graph_on
from nybble.sizes import GRAPH_MULTIPLE, SHAPE_RULES
from nybble.training.objective import Objective, Part, Totals

MOST_GRAPHS = 8  # each takes some megabytes beside the pool, and seconds to make
MICRO_BATCHES_A_TRIM = 4  # as many again take what was returned
CAPTURED_AFTER = 3  # micro-batches of a shape: one without a graph, and its first two runs

Shape = tuple[int, ...]


class GradientAccumulation:
    """Adds the gradients of micro-batches, one after the other.

    Args:
        graphs: may be captured: there is memory for what they compute in.
    """

    def __init__(self, objective: Objective, model: BatchModel, *, graphs: bool = True):
        self._objective, self._model = objective, model
        self._rules = SHAPE_RULES[model.device.type]
        graph_type = graph_on(model.device)
        self._graph_type = graph_type if graph_type is not None and _can_be_captured(objective, model) else None
        self._captures = graphs
        self._trims, self._done = lies_in_heap(model.device) and not model.packed, 0
        self._met: Counter[Shape] = Counter()
        self._graphs: dict[Shape, _FromGraph] = {}

    def prepare(self, batch: Batch) -> Batch:
        """The batch on the model's device, filled up where it is one of few tokens."""
        if self._graph_type is not None:
            batch = self._filled_up(batch)
        return batch.to(self._model.device)

    def __call__(self, batch: Batch, totals: Totals) -> Part:
        """Add a prepared batch's gradients; returns its part of the step, on the model's device.

        Args:
            totals: of the whole step.
        """
        graph = self._graph_for(batch)
        if graph is None:
            part = forward_backward(self._objective, self._model, batch, totals)
            self._done += 1
            if self._trims and self._done % MICRO_BATCHES_A_TRIM == 0:
                trim_heap()
            return part
        assert isinstance(self._model, CausalLM)
        self._model.check_targets(batch)
        return Part(graph.run(batch, totals.terms))

    def rehearse(self, batch: Batch, totals: Totals) -> None:
        """Take the memory that a prepared batch of this shape will take, its graph's included."""
        for _ in range(1 if self._shape(batch) is None else CAPTURED_AFTER):
            self(batch, totals)

    def drop_graphs(self) -> bool:
        """Make room: no graphs from now on. Whether there were any."""
        had, self._captures = bool(self._graphs), False
        self._graphs.clear()
        return had

    def _filled_up(self, batch: Batch) -> Batch:
        tokens = _multiple(batch.input_ids.shape[1])
        if not self._few(tokens):
            return batch
        longest = max(batch.max_document_length, tokens - batch.input_ids.shape[1])
        return fill_up(
            batch,
            tokens=tokens,
            documents=_power_of_two(len(batch.document_lengths) + 1),
            longest=min(tokens, _power_of_two(longest)),
            supervised=max(GRAPH_MULTIPLE, _multiple(batch.supervised_tokens)),
        )

    def _few(self, tokens: int) -> bool:
        assert isinstance(self._model.backbone, FusedForward)
        return self._rules.in_graphs(tokens, self._model.backbone.block_elements)

    def _shape(self, batch: Batch) -> Shape | None:
        """What its graph is found by; None where it has none."""
        if not self._captures or self._graph_type is None or not self._few(batch.input_ids.shape[1]):
            return None
        assert batch.cu_seqlens is not None
        sizes = batch.input_ids.shape[1], batch.max_document_length, len(batch.cu_seqlens)
        return *sizes, len(batch.supervised_positions), batch.weights is not None

    def _graph_for(self, batch: Batch) -> "_FromGraph | None":
        shape = self._shape(batch)
        if shape is None:
            return None
        self._met[shape] += 1
        if shape not in self._graphs and self._met[shape] > 1 and len(self._graphs) < MOST_GRAPHS:
            assert self._graph_type is not None
            self._graphs[shape] = _FromGraph(self._graph_type, self._objective, self._model, batch)
        return self._graphs.get(shape)


class _FromGraph:
    """Micro-batches of one shape; each is copied to where the first one lay."""

    def __init__(self, graph_type: type[Graph], objective: Objective, model: BatchModel, batch: Batch):
        assert isinstance(model, CausalLM)
        backbone, head = model.backbone, model.head
        assert isinstance(backbone, FusedForward) and isinstance(head, LossHead)
        self._backbone = backbone
        self._batch = batch.copy()
        self._denominator = torch.ones((), dtype=wide_dtype(model.device), device=model.device)
        self._graph = graph_type(
            partial(_loss_of, objective, model, self._batch, Totals(self._denominator)),
            partial(rooms_of, backbone, head),
        )

    def run(self, batch: Batch, denominator: Denominator) -> Tensor:
        self._batch.take(batch)
        self._denominator.fill_(denominator)
        self._backbone.refresh_adapters()  # a graph knows nothing of what has changed
        return self._graph().clone()


def forward_backward(objective: Objective, model: BatchModel, batch: Batch, totals: Totals) -> Part:
    """Add a micro-batch's gradients; returns its part of the step, on the model's device.

    A function of its own, so that nothing outlives it: after a failed allocation all that it held is free.
    """
    part = objective.loss(model, batch, totals)
    part.loss.backward()
    return replace(part, loss=part.loss.detach())


def _loss_of(objective: Objective, model: BatchModel, batch: Batch, totals: Totals) -> Tensor:
    """What a graph leaves behind; objectives with metrics are not captured."""
    return forward_backward(objective, model, batch, totals).loss


def rooms_of(backbone: FusedForward, head: LossHead) -> list[Tensor]:
    """Memory of a model that passes write into and that outlives them."""
    return [*backbone.weights.rooms.kept.values(), *head.rooms.kept.values()]


def _can_be_captured(objective: Objective, model: BatchModel) -> bool:
    """Whether a pass over the model asks its device for the same each time, and nobody on the way for anything.

    Nothing is drawn: with dropout no decoder blocks compute the model.
    """
    return (
        objective.capturable
        and isinstance(model, CausalLM)
        and isinstance(model.backbone, FusedForward)
        and model.backbone.asks_for_nothing
        and isinstance(model.head, LossHead)
        and isinstance(model.head.weight, Tensor)
    )


def _multiple(number: int) -> int:
    return -(-number // GRAPH_MULTIPLE) * GRAPH_MULTIPLE


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
