"""Graphs, as far as a CPU shows: what the recorded graph of these tests notices, since others lean on it."""

import pytest
import torch
from recorded_graph import Forbidden, RecordedGraph
from torch import Tensor

from nybble.kernels.ops.norm import rms_norm
from nybble.memory.graph import GRAPHS, CudaGraph, graph_on


def test_a_cpu_has_none_and_a_gpu_has():
    assert graph_on(torch.device("cpu")) is None and graph_on(torch.device("cuda")) is GRAPHS["cuda"]


on_both = pytest.mark.parametrize(
    ("device", "graph_type"), [("cpu", RecordedGraph), pytest.param("cuda", CudaGraph, marks=pytest.mark.gpu)]
)


@on_both
def test_a_replay_reads_what_lies_where_it_was_and_runs_once(device, graph_type):
    x, weight, count = torch.zeros(3, 8, device=device), torch.ones(8, device=device), torch.zeros((), device=device)

    def function() -> Tensor:
        count.add_(1)
        return rms_norm(x * 2, weight, 1e-6)[0].flatten()[4:] + count

    graph = graph_type(function)
    for run in range(1, 6):
        x.normal_()
        expected = torch.nn.functional.rms_norm(x * 2, (8,), weight, 1e-6).flatten()[4:] + run
        torch.testing.assert_close(graph(), expected)
    assert count == 5


@on_both
def test_gradients_are_added_in_a_replay_too(device, graph_type):
    x, weight = torch.zeros(4, 8, device=device), torch.ones(8, device=device, requires_grad=True)
    weight.grad = torch.zeros_like(x[0])

    def function() -> Tensor:
        loss = (x * weight).square().sum()
        loss.backward()
        return loss.detach()

    graph, total = graph_type(function), torch.zeros_like(x[0])
    for _ in range(4):
        x.normal_()
        total += 2 * x.square().sum(0)
        torch.testing.assert_close(graph(), x.square().sum())
    torch.testing.assert_close(weight.grad, total)


def test_numbers_of_the_host_are_those_of_the_recording():
    x, factor = torch.ones(3), 1.0
    graph = RecordedGraph(lambda: x * factor)
    results = []
    for factor in (1.0, 2.0, 3.0):  # noqa: B007
        results.append(float(graph()[0]))
    assert results == [1.0, 2.0, 2.0]


@pytest.mark.parametrize("keeps", [False, True])
def test_memory_that_was_given_back_is_missed_unless_it_is_kept(keeps):
    rooms = [torch.ones(3)]
    graph = RecordedGraph(lambda: rooms[0] * 2, lambda: list(rooms) if keeps else ())
    for _ in range(2):
        graph()
    rooms[0] = torch.zeros(5)
    if keeps:
        assert graph().tolist() == [2.0, 2.0, 2.0]
    else:
        with pytest.raises(Forbidden, match="given back"):
            graph()


def test_results_are_valid_until_another_graph_runs():
    x = torch.ones(3)
    first, second = RecordedGraph(lambda: x + 1), RecordedGraph(lambda: x + 2)
    for _ in range(2):
        second()
        result = first()
    assert result.tolist() == [2.0, 2.0, 2.0]
    second()
    assert result.isnan().all()


def test_memory_that_a_replay_does_not_write_is_rubbish():
    fill = torch.ones(())
    host: list[bool] = []

    def function() -> Tensor:
        y = torch.empty(3)
        y[0].copy_(fill)
        if not host:
            y[1:].copy_(fill)
        return y

    graph = RecordedGraph(function)
    graph()
    host.append(True)
    graph()
    assert graph().isnan().tolist() == [False, True, True]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x.sum().item(),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: x if torch.equal(x, x) else -x,
        lambda x: x if (x > 0).all() else -x,
        lambda x: torch.nn.functional.dropout(x, 0.5),
        lambda x: x.unique(),
    ],
)
def test_what_a_capture_forbids_raises(function):
    x = torch.ones(3)
    graph = RecordedGraph(lambda: function(x))
    graph()
    with pytest.raises(Forbidden):
        graph()
