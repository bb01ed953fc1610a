"""Plans for GPUs that are not here: the table, what a run on one costs beside its tensors, and what is measured where
there is one.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import nybble
from nybble.cards import CARDS
from nybble.errors import ConfigError
from nybble.formats.quant_spec import QuantSpec
from nybble.planning import cuda_costs, machine
from nybble.planning.block_costs import kept_bytes
from nybble.planning.costs import Part, predict
from nybble.planning.machine_table import CUDA_CONTEXT_BYTES, named_machine
from nybble.planning.planner import _bytes_beside, _step_seconds
from nybble.planning.run_shape import MicroBatches, RunShape
from nybble.planning.shape import shape_of
from nybble.sizes import PAGE_BYTES, SHAPE_RULES
from nybble.sources.shapes import SHAPES
from nybble.sources.skeleton import build_skeleton

MiB = 2**20


@pytest.fixture(scope="module")
def on_gpu() -> RunShape:
    """Llama-3-8B, 4 rows of 2,048 tokens, r = 16 on every linear layer."""
    from transformers import AutoConfig

    model = shape_of(build_skeleton(AutoConfig.for_model(**SHAPES["llama-3-8b"])))
    batches = MicroBatches(8192, 8192, 2048, 1, 0, 0, 0)
    run = RunShape(model, batches, 41_943_040, 16, 2, QuantSpec(), "blocks", "everything", SHAPE_RULES["cuda"])
    return replace(run, on_cpu=False, micro_batches=1)


def test_every_card_is_a_machine_and_sizes_that_are_given_replace_its_own():
    assert {card.memory_gb for card in CARDS.values()} >= {12, 16, 24, 32, 40, 48, 80, 141, 192}
    for name, card in CARDS.items():
        found = named_machine(name, None, None)
        assert (found.kind, found.budget_bytes, found.here) == ("cuda", card.memory_gb * 10**9, False)
        assert 1e13 < found.flops <= card.tflops * 1e12 and found.ram_bytes_per_s < card.memory_gb_per_s * 1e9 / 2
        assert all(0 < share < 1 for share in card.attention)
    given = named_machine("h100", 40 * 10**9, 16 * 10**9)
    assert (given.budget_bytes, given.host_bytes) == (40 * 10**9, 16 * 10**9)


def test_an_unknown_machine_names_the_nearest_and_all_there_are():
    with pytest.raises(ConfigError, match=r"Did you mean 'rtx-4090'\?") as refused:
        nybble.plan(model="tiny", machine="4090")
    assert all(name in refused.value.allowed for name in CARDS)


def test_a_device_of_the_old_table_is_refused_with_the_option_that_replaced_it():
    with pytest.raises(ConfigError, match="--machine"):
        nybble.plan(model="tiny", device="24GB-gpu")


def test_a_machine_and_a_device_of_this_one_are_not_both():
    with pytest.raises(ConfigError, match="Leave out one"):
        nybble.plan(model="tiny", machine="h100", device="cpu")


def test_a_plan_for_a_card_takes_the_way_of_one_and_says_that_it_never_ran(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    planned = nybble.plan(model="llama-3-8b", machine="l40s", max_seq_len=512)
    assert planned.asked.run.path == "blocks", "whatever runs on this machine"
    assert str(planned).startswith("l40s, 48 GB to plan for; predicted; never run on such a card\n")
    assert planned.to_json()["machine"]["note"] == "predicted; never run on such a card"
    here = nybble.plan(model="tiny", device="cpu")
    assert "never run" not in str(here) and "note" not in here.to_json()["machine"]


@pytest.mark.parametrize(
    ("card", "keep", "ideal_s"),
    [("h100", "everything", 0.437), ("h100", "nothing", 0.574), ("rtx-4090", "everything", 1.862)],
)
def test_a_step_takes_its_products_and_every_byte_that_cannot_be_avoided(on_gpu, card, keep, ideal_s):
    """Added up by hand from 2 TN, FlashAttention-2's rates, 2.5 bytes a weight, the widths that each op moves."""
    assert _step_seconds(replace(on_gpu, keep=keep), named_machine(card, None, None)) == pytest.approx(
        ideal_s, rel=0.04
    )


def test_short_steps_wait_for_their_host(on_gpu):
    short = replace(on_gpu, batches=MicroBatches(64, 64, 64, 1, 0, 0, 0))
    assert _step_seconds(short, named_machine("h100", None, None)) >= 2 * 32 * 5e-4


def test_short_steps_come_from_graphs_where_there_is_memory_for_their_pool(on_gpu):
    short = replace(on_gpu, batches=MicroBatches(1000, 700, 500, 1, 0, 0, 0))
    full = replace(on_gpu, batches=MicroBatches(1024, 768, 500, 1, 0, 0, 0))
    assert short.filled_up and not replace(short, offload=True).filled_up and not on_gpu.filled_up
    parts, graphed = predict(short), predict(replace(short, graphs=True))
    assert parts == predict(full)
    pool = graphed.pop(Part.GRAPHS)
    assert graphed == parts and pool == parts[Part.KEPT] + max(parts.get(Part.HEAD, 0), parts.get(Part.AT_WORK, 0))
    h100 = named_machine("h100", None, None)
    assert _step_seconds(replace(short, graphs=True), h100) <= _step_seconds(short, h100)
    asked = {"model": "llama-3-8b", "max_seq_len": 512, "micro_batch_size": 1, "machine": "h100", "keep": "nothing"}
    wide = nybble.plan(**asked).plans.chosen
    narrow = nybble.plan(**asked, memory=wide.peak_bytes - 1).plans.chosen
    assert wide.run.graphs and "from graphs" in wide.describe()
    assert not narrow.run.graphs and narrow.peak_bytes == wide.peak_bytes - wide.components[Part.GRAPHS]


@pytest.mark.parametrize(
    ("num_bytes", "reserved"),
    [
        (1, 512),
        (513, 1024),
        (600_000, 2 * MiB // 3),
        (8 * MiB, 10 * MiB),
        (10 * MiB, 10 * MiB),
        (10 * MiB + 1, 12 * MiB),
    ],
)
def test_tensors_lie_in_segments(num_bytes, reserved):
    assert cuda_costs.reserved_bytes(num_bytes) == reserved


def test_a_gpu_run_counts_what_its_libraries_take(on_gpu):
    parts = predict(on_gpu)
    assert parts[Part.WORKSPACE] == 64 * MiB and parts[Part.RESERVED] >= 22 * MiB
    assert not {Part.GAPS, Part.PRODUCTS, Part.MARGIN} & parts.keys(), "the CPU's"
    rows, q, kv, heads = 8192 + 4 * 128, 4096, 1024, 32
    scratch = 4 * rows * (q + heads) + 2 * 8192 * (q + 2 * kv) + 2 * 2 * 8192 * q
    assert cuda_costs.flash_scratch(on_gpu) == scratch
    alike = replace(on_gpu, model=replace(on_gpu.model, key_value_width=q))
    assert cuda_costs.flash_scratch(alike) == 4 * rows * (q + heads) + 2 * 8192 * 3 * q, "nothing to expand"
    odd = replace(on_gpu, keep="nothing", batches=replace(on_gpu.batches, tokens=1024))
    assert kept_bytes(odd) == 10 * MiB, "8 MiB of states, of which two fill a segment of 20"


def test_pinned_memory_is_counted_beside_a_gpu(on_gpu):
    streamed = replace(on_gpu, resident_blocks=10, page_bytes=3 * PAGE_BYTES)
    block = sum(on_gpu.spec.bytes(i * o) for _, i, o in on_gpu.model.parts.blocks[0][0].linears)
    assert _bytes_beside(streamed) == block + PAGE_BYTES
    assert _bytes_beside(replace(streamed, from_ram=True)) == 22 * block + PAGE_BYTES
    assert _bytes_beside(replace(streamed, on_cpu=True)) == 0


@pytest.mark.parametrize(("free", "context"), [(23.4e9, 600_000_000), (15e9, CUDA_CONTEXT_BYTES)])
def test_a_gpu_here_is_measured_once_its_context_is_there(monkeypatch, free, context):
    """On fakes: what is taken is this process's, unless it is too much; and it is not taken from a budget twice."""
    cpu = torch.device("cpu")
    fake = SimpleNamespace(
        mem_get_info=lambda device: (int(free) - 10**8, 24 * 10**9),
        memory_reserved=lambda device: 10**8,
        synchronize=lambda device: None,
        empty_cache=lambda: None,
    )
    monkeypatch.setattr(machine, "allocator", lambda device: fake)
    others = 0 if context > 5 * 10**8 else 24 * 10**9 - int(free) - context
    assert machine.context_bytes(cpu) == (context, others)
    monkeypatch.setattr(machine, "has_own_memory", lambda device: True)
    monkeypatch.setattr(machine, "available_bytes", lambda device: int(free))
    monkeypatch.setattr(machine, "_link_speed", lambda device: 2e10)
    found = machine.this_machine(cpu, torch.float32, memory=24 * 10**9)
    assert (found.process_bytes, found.budget_bytes) == (context, min(24 * 10**9, int(free) + context))
    assert found.link_bytes_per_s == 2e10 and found.here and found.others_bytes == others


def test_probes_of_a_gpu_are_too_large_to_be_bound_by_their_calls():
    rows, width = machine.PROBE_PRODUCT["cuda"]
    assert 2 * rows * width**2 / named_machine("b200", None, None).flops > 1e-4
    assert machine.PROBE_COPY_BYTES["cuda"] > 256 * MiB, "an MI300X's cache"
