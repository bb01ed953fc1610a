"""Steps of generation from graphs: the tokens and the logits that come without. The graph is recorded
(tests/recorded_graph.py): no card has replayed one.
"""

import gc
import weakref

import pytest
import torch
from recorded_graph import KeptGraph, RecordedGraph
from tiny import SMALL, put_into_four_bits, tune
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig

from nybble.generation import decoding
from nybble.generation.decoding import CachedDecoder, KeyValueCache
from nybble.generation.generate import Sampling, generate
from nybble.kernels import registry
from nybble.kernels.ops.decode import MAX_ROWS
from nybble.memory import graph

GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 4, "head_dim": 16}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, attention_bias=True),
    "mistral, window": MistralConfig(**SMALL, sliding_window=5),
    "gemma3": Gemma3TextConfig(**SMALL, **GEMMA, layer_types=["sliding_attention", "full_attention"]),
    "dynamic rope": LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
}
PROMPTS = [[5, 17, 40, 3, 88, 21, 60], [9], [70, 2, 2, 31, 90, 14, 55, 6, 77, 41, 12, 8, 33]]


@pytest.fixture(autouse=True)
def op_by_op():
    """As it is where there is no kernel for all layers."""
    with registry.use("reference"):
        yield


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(graph.GRAPHS, "cpu", RecordedGraph)
    monkeypatch.setattr(decoding, "FIRST_ROOM", 3)  # the cache grows twice


def small_model(name: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    put_into_four_bits(model)
    return tune(model).eval()


def answers(model, stop_ids=()) -> list[list[int]]:
    sampling = Sampling(temperature=3.0, repetition_penalty=1.3, seed=1)
    return generate(model, PROMPTS, stop_ids=stop_ids, max_new_tokens=14, sampling=sampling)


@pytest.mark.parametrize("name", [pytest.param("mistral, window", marks=pytest.mark.slow), "gemma3", "dynamic rope"])
def test_answers_are_those_without_graphs_also_where_texts_end_and_the_cache_grows(name, request, monkeypatch):
    model = small_model(name)
    whole = answers(model)
    stops = next((a, b) for a in whole[0][3:] for b in whole[1][7:] if not {a, b} & {*whole[2][:11], whole[0][0]})
    expected = answers(model, stops)
    lengths = sorted(map(len, expected))
    assert 0 < lengths[0] < lengths[1] < lengths[2] and len({tuple(ids) for ids in whole}) == 3
    request.getfixturevalue("graphs")
    monkeypatch.setitem(graph.GRAPHS, "cpu", KeptGraph)
    assert answers(model, stops) == expected
    assert answers(model) == whole
    assert bool(KeptGraph.made) == (name != "dynamic rope")
    assert sum(each.replays for each in KeptGraph.made) >= (10 if KeptGraph.made else 0)
    KeptGraph.made.clear()


def logits_of_steps(model, texts: int, steps: int, graphs: bool = True) -> tuple[Tensor, CachedDecoder]:
    decoder = CachedDecoder(model, graphs=graphs)
    decoder.start((PROMPTS * 3)[:texts], steps)
    found = [decoder.step((torch.arange(texts) * 13 + 7 * step) % 96).clone() for step in range(steps)]
    return torch.stack(found), decoder


def test_logits_are_those_without_graphs_to_the_bit_and_most_steps_are_replays(graphs, monkeypatch):
    model = small_model("mistral, window")
    monkeypatch.setattr(decoding, "FIRST_ROOM", 64)
    got, decoder = logits_of_steps(model, 3, 9)
    assert decoder._graph.replays == 7
    expected, _ = logits_of_steps(model, 3, 9, graphs=False)
    assert torch.equal(got, expected)


def test_a_step_that_did_not_advance_on_the_device_would_be_seen(graphs, monkeypatch):
    model = small_model("llama")
    got, _ = logits_of_steps(model, 2, 6)

    def of_the_host(cache: KeyValueCache) -> None:
        cache.columns = torch.full_like(cache.texts, cache.end - 1)

    monkeypatch.setattr(KeyValueCache, "advance", of_the_host)
    stale, _ = logits_of_steps(model, 2, 6)
    assert torch.equal(got[:2], stale[:2]) and not torch.equal(got[2:], stale[2:])


def test_many_texts_share_one_dequantisation_and_no_graph(graphs):
    _, decoder = logits_of_steps(small_model("llama"), MAX_ROWS + 1, 3)
    assert decoder._graph is None
    decoder.keep(range(MAX_ROWS))
    assert isinstance(decoder._graph, RecordedGraph)


@pytest.mark.parametrize("graphed", [False, True])
def test_a_cache_goes_with_its_decoder(graphed, graphs):
    _, decoder = logits_of_steps(small_model("llama"), 2, 3, graphs=graphed)
    cache = weakref.ref(decoder.cache)
    gc.disable()
    try:
        del decoder
        assert cache() is None
    finally:
        gc.enable()
