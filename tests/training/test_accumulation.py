"""Micro-batches from graphs: losses and gradients are those of the same batches without, to the bit; and what is filled
up in a batch changes none. The graph is recorded (tests/recorded_graph.py): no card has replayed one.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from recorded_graph import Forbidden, RecordedGraph
from tiny import SMALL, put_into_four_bits, tune
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config

from nybble import sizes
from nybble.data.examples import EncodedExample
from nybble.data.packing import Batch, pack
from nybble.errors import ModelError
from nybble.kernels.heap import TrimmedHeap
from nybble.layers import augmented
from nybble.layers.causal_lm import CausalLM
from nybble.memory import graph
from nybble.sizes import GRAPH_MULTIPLE, SHAPE_RULES
from nybble.training import accumulation
from nybble.training.accumulation import GradientAccumulation
from nybble.training.objective import Part, SupervisedFineTuning, Totals
from nybble.training.optimizer import AdamW

GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 4, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 16}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "gemma2": Gemma2Config(**SMALL, **GEMMA, final_logit_softcapping=5.0),
}
ONE_SHAPE = ((7, 1, 20), (33, 9, 2), (10, 17, 37))  # documents of micro-batches
OTHER_SHAPE = (40, 1, 2, 3, 4, 6, 7, 9)


@pytest.fixture(autouse=True)
def few_tokens_come_from_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(graph.GRAPHS, "cpu", RecordedGraph)
    monkeypatch.setitem(SHAPE_RULES, "cpu", replace(SHAPE_RULES["cpu"], graph_work=3e11))
    monkeypatch.setattr(accumulation, "GRAPH_MULTIPLE", 64)


def batch_of(lengths: Sequence[int], seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(96, (n,), generator=generator, dtype=torch.int32) for n in lengths]
    supervised = [torch.rand(n, generator=generator) < 0.7 for n in lengths]
    return pack([EncodedExample(*each, f"{seed}") for each in zip(ids, supervised, strict=True)])


def adapted(name: str, keep: str, dtype: torch.dtype) -> CausalLM:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype)
    put_into_four_bits(model, dtype=dtype)
    return CausalLM.of(tune(model), keep=keep)


@functools.cache
def without_graphs(name: str, keep: str, dtype: torch.dtype, wide: bool) -> list[Tensor]:
    """`wide`: projections of one product, which the caller has seen to."""
    return trained(adapted(name, keep, dtype), graphs=False)


def trained(model: CausalLM, graphs: bool) -> list[Tensor]:
    """Losses, gradients and adapters of steps whose micro-batches differ; between them an evaluation of more tokens."""
    optimizer = AdamW(model.parameters(), beta1=0.9, beta2=0.99, weight_decay=0.1)
    run = GradientAccumulation(SupervisedFineTuning(), model, graphs=graphs)
    found: list[Tensor] = []
    for step in range(4):
        for place, lengths in enumerate((*ONE_SHAPE[: 1 + step % 3], OTHER_SHAPE)):
            batch = run.prepare(batch_of(lengths, 10 * step + place))
            found.append(run(batch, Totals(50.0 + step)).loss)
        found += [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step(1e-2, grad_scale=0.5)
        if step == 1:  # then the graph of the first shape is there
            model.token_losses(batch_of((300,), step).to("cpu"))
    replays = [each._graph.replays for each in run._graphs.values()]
    assert replays == ([4, 1] if graphs else [])
    return [*found, *(parameter.detach().clone() for parameter in model.parameters())]


@pytest.mark.parametrize(
    ("name", "keep", "dtype", "wide"),
    [
        ("llama", "nothing", torch.float32, False),
        ("qwen3", "everything", torch.bfloat16, True),
        pytest.param("gemma2", "attention", torch.float32, True, marks=pytest.mark.slow),
    ],
)
def test_steps_from_graphs_are_those_without_to_the_bit(name, keep, dtype, wide, monkeypatch):
    monkeypatch.setitem(augmented.ONE_PRODUCT, "cpu", wide)
    expected, got = without_graphs(name, keep, dtype, wide), trained(adapted(name, keep, dtype), graphs=True)
    assert all(map(torch.equal, got, expected)) and len(got) == len(expected)


def test_what_is_filled_up_changes_neither_loss_nor_gradients():
    model = adapted("gemma2", "nothing", torch.float32)
    run = GradientAccumulation(SupervisedFineTuning(), model)
    for lengths in (*ONE_SHAPE, OTHER_SHAPE, (64,), (63, 1), (1, 1)):
        batch = batch_of(lengths, len(lengths))
        filled = run.prepare(batch)
        assert filled.input_ids.shape[1] % 64 == 0 and len(filled.supervised_positions) % 64 == 0
        assert (filled.num_tokens, filled.supervised_tokens) == (sum(lengths), batch.supervised_tokens)
        results = []
        for each in (batch.to("cpu"), filled):
            model.module.zero_grad()
            loss = model.loss(each, 7.0)
            loss.backward()
            results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        for got, right in zip(*reversed(results), strict=True):
            torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("forgotten", ["denominator", "batch", "adapters", "buffers"])
def test_what_a_graph_would_miss_is_seen(forgotten, monkeypatch):
    """Each thing that is done for a graph, left out."""
    expected = without_graphs("llama", "nothing", torch.float32, False)
    if forgotten == "batch":
        monkeypatch.setattr(Batch, "take", lambda self, other: None)
    if forgotten == "adapters":
        monkeypatch.setattr(accumulation.FusedForward, "refresh_adapters", lambda self: None)
    if forgotten == "buffers":
        monkeypatch.setattr(accumulation, "rooms_of", lambda backbone, head: list(backbone.weights.rooms.kept.values()))
    if forgotten == "denominator":
        of_number = accumulation.forward_backward
        monkeypatch.setattr(
            accumulation, "forward_backward", lambda *args: of_number(*args[:3], Totals(float(args[3].terms)))
        )
    if forgotten in ("batch", "adapters"):
        got = trained(adapted("llama", "nothing", torch.float32), graphs=True)
        assert not all(map(torch.equal, got, expected))
    else:
        with pytest.raises(Forbidden):
            trained(adapted("llama", "nothing", torch.float32), graphs=True)


def test_graphs_are_few_and_only_for_few_tokens(monkeypatch):
    model = adapted("llama", "nothing", torch.float32)
    block = model.backbone.block_elements
    assert block == 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96
    run = GradientAccumulation(SupervisedFineTuning(), model)
    monkeypatch.setattr(accumulation, "MOST_GRAPHS", 1)
    for lengths in (ONE_SHAPE[0], ONE_SHAPE[1], OTHER_SHAPE, OTHER_SHAPE):
        run(run.prepare(batch_of(lengths, 1)), Totals(9.0))
    assert len(run._graphs) == 1 and run.drop_graphs() and not run.drop_graphs()
    run(run.prepare(batch_of(ONE_SHAPE[0], 1)), Totals(9.0))
    assert not run._graphs
    monkeypatch.setitem(SHAPE_RULES, "cpu", replace(SHAPE_RULES["cpu"], graph_work=64.0 * block))
    run = GradientAccumulation(SupervisedFineTuning(), model)
    assert [run.prepare(batch_of((n,), 1)).input_ids.shape[1] for n in (3, 64, 65)] == [64, 64, 65]


def test_a_target_outside_of_the_vocabulary_is_refused_before_a_replay():
    model = adapted("llama", "nothing", torch.float32)
    run = GradientAccumulation(SupervisedFineTuning(), model)
    for seed in range(4):
        run(run.prepare(batch_of((9, 8), seed)), Totals(9.0))
    wrong = batch_of((9, 8), 1)
    wrong.targets[wrong.targets >= 0] = 96
    with pytest.raises(ModelError, match="A target is 96"):
        run(run.prepare(wrong), Totals(9.0))


def test_what_waits_or_comes_from_elsewhere_is_in_no_graph(monkeypatch):
    model = adapted("llama", "nothing", torch.float32)
    batch = batch_of((5, 4), 0)

    def tokens() -> int:
        return GradientAccumulation(SupervisedFineTuning(), model).prepare(batch).input_ids.shape[1]

    assert tokens() == 64
    for owner, name, value in (
        (model.backbone, "kept", TrimmedHeap(1)),
        (model.backbone.weights, "store", object()),
        (model.backbone.blocks[1], "attention_waits", lambda like: True),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert tokens() == 9
    assert model.backbone.blocks[0].attention_waits(torch.zeros(1, device="meta"))  # PyTorch's, as for a soft cap
    assert tokens() == 64
    monkeypatch.delitem(graph.GRAPHS, "cpu")
    assert tokens() == 9


class OwnLoss(SupervisedFineTuning):
    def loss(self, model, batch, totals):
        return Part(model.loss(batch, totals.terms) * batch.num_tokens)


def test_an_objective_with_a_loss_of_its_own_says_so_itself():
    model = adapted("llama", "nothing", torch.float32)
    batch = batch_of((5, 4), 0)
    assert GradientAccumulation(OwnLoss(), model).prepare(batch).input_ids.shape[1] == 9
    assert sizes.GRAPH_MULTIPLE == GRAPH_MULTIPLE == 256
