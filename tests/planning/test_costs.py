import functools
import mmap
import time
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, BertConfig, BertForSequenceClassification, BertModel

from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.layers.loss_head import LossHead
from nybble.memory.measure import PeakMemory, _left_in_cgroups, anonymous_bytes, available_bytes
from nybble.planning.base_costs import base_bytes, dense_bytes, mean_bits
from nybble.planning.block_costs import input_bytes, kept_bytes, working_bytes
from nybble.planning.costs import Part, compiled_products, predict
from nybble.planning.head_costs import head_bytes
from nybble.planning.run_shape import MicroBatches, RunShape
from nybble.planning.shape import shape_of
from nybble.quantization.walk import STATES_DTYPE
from nybble.sizes import CALIBRATION_STATE_BYTES, SHAPE_RULES
from nybble.sources.skeleton import build_skeleton

LLAMA_2_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


def of_config(config):
    return shape_of(build_skeleton(AutoConfig.for_model(**config)))


@functools.cache
def llama_2_70b():
    return of_config(LLAMA_2_70B)


def test_llama_2_70b_takes_the_bytes_that_are_published():
    shape = llama_2_70b()
    elements = shape.parts.linear_elements
    assert elements == pytest.approx(68.45e9, rel=1e-3)
    assert base_bytes(shape, QuantSpec()) == pytest.approx(35.31e9, rel=1e-3)
    assert dense_bytes(shape) == pytest.approx(2 * 2 * 32000 * 8192, rel=0.01)
    (block, count), *others = shape.parts.blocks
    assert not others
    assert count * sum(16 * (i + o) for _, i, o in block.linears) == pytest.approx(207e6, rel=1e-2)


def test_four_bits_and_double_quantisation_cost_what_the_format_says():
    shape = llama_2_70b()
    elements = shape.parts.linear_elements
    assert 8 * base_bytes(shape, QuantSpec(double_quant=False)) / elements == pytest.approx(4.5, rel=1e-4)
    assert 8 * base_bytes(shape, QuantSpec()) / elements == pytest.approx(4.127, rel=1e-3)
    assert 8 * base_bytes(shape, QuantSpec("nf3")) / elements == pytest.approx(3.127, rel=1e-3)
    assert 8 * base_bytes(shape, QuantSpec("nf2")) / elements == pytest.approx(2.127, rel=1e-3)
    assert 8 * base_bytes(shape, QuantSpec(), average_bits=2.75) / elements == pytest.approx(2.75, rel=1e-6)
    assert 8 * base_bytes(shape, None) / elements == 16
    assert base_bytes(shape, None, average_bits=2.75) == base_bytes(shape, None), "16 bits whatever was chosen for four"


def test_layers_of_several_formats_take_their_mean_by_size():
    shape = llama_2_70b()
    layers = {f"model.layers.{i}.self_attn.{leaf}": "nf4" for i in range(2) for leaf in ("q_proj", "k_proj")}
    formats = BaseFormats(QuantSpec(), layers | {"model.layers.0.mlp.up_proj": "nf2"})
    sizes = [8192 * 8192, 8192 * 1024] * 2
    stored = sum(QuantSpec("nf4").bytes(n) for n in sizes) + QuantSpec("nf2").bytes(8192 * 28672)
    most = 8 * QuantSpec("nf4").bytes(sum(sizes[:2])) / sum(sizes[:2])  # of the second block
    assert mean_bits(shape, formats) == pytest.approx((8 * stored / (sum(sizes) + 8192 * 28672), most))


@pytest.mark.parametrize("path", ["blocks", "generic"])
def test_keeping_more_costs_more(path):
    shape = llama_2_70b()
    peaks = []
    for keep in ("nothing", "attention", "everything"):
        batches = MicroBatches(512, 200, 512, 1, 512, 200, 0)
        run = RunShape(shape, batches, 207_000_000, 16, 2, QuantSpec(), path, keep, SHAPE_RULES["cpu"])
        peaks.append(sum(predict(run).values()))
    assert peaks == sorted(peaks) and peaks[0] < peaks[2]


def test_blocks_whose_tensors_lie_in_slabs_leave_few_gaps():
    batches = MicroBatches(512, 512, 512, 1, 512, 512, 0)

    def gaps(path: str) -> float:
        run = RunShape(llama_2_70b(), batches, 10**6, 16, 2, QuantSpec(), path, "nothing", SHAPE_RULES["cpu"])
        parts = predict(run)
        return parts[Part.GAPS] / (parts[Part.KEPT] + parts.get(Part.AT_WORK, 0) + parts.get(Part.HEAD, 0))

    assert gaps("blocks") < 0.12 < 0.5 < gaps("generic")


def test_states_at_the_head_are_counted_as_their_norm_keeps_them():
    batches = MicroBatches(512, 512, 512, 1, 512, 512, 0)
    run = RunShape(llama_2_70b(), batches, 10**6, 16, 2, QuantSpec(), "blocks", "nothing", SHAPE_RULES["cuda"])
    gpu = replace(run, on_cpu=False)
    fp32, trained, generic = (
        replace(gpu, compute_bytes=4),
        replace(gpu, trained_parameters=8192),
        replace(gpu, path="generic"),
    )
    of_a_state = [head_bytes(each) / 512 / 8192 for each in (gpu, fp32, trained, generic, run)]
    assert of_a_state == [12, 24, 24, 24, 12]


def test_buffers_and_tensors_on_their_way_are_counted_as_each_device_has_them():
    batches = MicroBatches(512, 512, 512, 1, 512, 512, 0)
    cpu = RunShape(llama_2_70b(), batches, 10**6, 16, 2, QuantSpec(), "blocks", "attention", SHAPE_RULES["cpu"])
    cpu = replace(cpu, resident_blocks=0, offload=True)
    gpu = replace(cpu, rules=SHAPE_RULES["cuda"], on_cpu=False)
    block = base_bytes(cpu.model, cpu.spec) // 80
    assert predict(cpu)[Part.STREAMED] == 2 * block
    assert predict(gpu)[Part.STREAMED] == 3 * block
    assert predict(replace(gpu, resident_blocks=78))[Part.STREAMED] == 2 * block
    at_work, moving = working_bytes(gpu), kept_bytes(gpu)
    assert Part.KEPT not in predict(cpu) and predict(cpu)[Part.AT_WORK] == working_bytes(cpu) + 2 * input_bytes(cpu)
    assert predict(gpu)[Part.KEPT] == moving and predict(gpu)[Part.AT_WORK] == at_work + moving


@pytest.mark.parametrize("own", [{}, {"logits_scaling": 2.0}, {"final_logit_softcapping": 30.0}])
@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [32_000, 128_256])
@pytest.mark.parametrize("kind", SHAPE_RULES)
def test_the_head_takes_the_room_that_is_planned(kind, vocabulary, compute_dtype, own, monkeypatch):
    """On every kind of device: of the logits and what is done to them, and of a panel where the head is widened."""
    monkeypatch.setitem(SHAPE_RULES, "meta", SHAPE_RULES[kind])
    wide = {"vocab_size": vocabulary, "hidden_size": 4096, "num_hidden_layers": 1}
    shape = of_config(LLAMA_2_70B | wide | own)
    weight = torch.empty(vocabulary, 4096, dtype=torch.bfloat16, device="meta")
    head = LossHead(weight, scale=1 / own.get("logits_scaling", 1.0), softcap=own.get("final_logit_softcapping"))
    states = torch.empty(8192, 4096, dtype=compute_dtype, device="meta", requires_grad=True)
    head.loss(states, torch.empty(8192, dtype=torch.long, device="meta"), 1.0)
    taken = {name: room.nbytes for name, room in head.rooms.kept.items()}
    batches, itemsize = MicroBatches(8192, 8192, 2048, 1, 8192, 8192, 0), compute_dtype.itemsize
    run = RunShape(shape, batches, 10**6, 16, itemsize, QuantSpec(), "blocks", "nothing", SHAPE_RULES[kind])
    planned = predict(run)
    assert planned[Part.LOGITS] == sum(taken.values()) - taken.get("panel", 0)
    assert planned.get(Part.PANEL, 0) == taken.get("panel", 0)


def test_large_tensors_leave_more_gaps_until_they_are_mapped_by_themselves():
    """Of modules that keep everything: by the size of an MLP's inner tensor, of which there is one at a time."""
    shares = []
    for tokens in (64, 128, 448, 640):  # 3.7, 7.3, 25.7 and 36.7 MB
        batches = MicroBatches(tokens, tokens, tokens, 1, tokens, tokens, 0)
        run = RunShape(llama_2_70b(), batches, 10**6, 16, 2, QuantSpec(), "generic", "everything", SHAPE_RULES["cpu"])
        planned = predict(run)
        shares.append(planned[Part.GAPS] / planned[Part.KEPT])
    small, large, larger, mapped = shares
    assert 0.12 < small < 0.2 and 0.36 < large < 0.44
    assert larger == pytest.approx(large, abs=0.01) and mapped < 0.8 * large


def test_products_of_the_same_widths_are_compiled_once():
    shape = of_config(LLAMA_2_70B | {"num_key_value_heads": 64})
    forward, backward = compiled_products(shape, 16)
    grouped = compiled_products(llama_2_70b(), 16)
    assert forward < grouped[0] and backward < grouped[1], "q, k and v of one width share theirs"


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN is what compiles them")
def test_products_are_as_many_as_a_block_multiplies():
    """Every product that a block's forward and backward pass ask PyTorch for, told apart by widths and strides."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import LlamaConfig, LlamaForCausalLM

    from nybble.data.packing import pack_tokens
    from nybble.layers.backbone import FusedForward
    from nybble.layers.convert import attach_adapters, quantizable_linears

    seen = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            name = function.overloadpacket.__name__
            if name in ("mm", "addmm", "addmm_"):
                out = (keywords or {}).get("out")
                operands = arguments if name == "mm" else arguments[1:]
                target = out if out is not None else arguments[0] if name != "mm" else None
                layouts = [(tuple(t.shape), tuple(t.stride())) for t in operands]
                seen.add((name == "mm", *layouts, target.stride() if target is not None else None))
            return function(*arguments, **(keywords or {}))

    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=24, vocab_size=128,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().requires_grad_(False)
    attach_adapters(model, quantizable_linears(model), rank=8, alpha=8, dropout=0, rslora=False, seed=0)
    forward_pass = FusedForward(model, "nothing")
    with Products():
        states = forward_pass.hidden(pack_tokens([torch.arange(64)]), torch.arange(64))
        forward = len(seen)
        states.float().sum().backward()
    shape = shape_of(build_skeleton(config))
    assert compiled_products(shape, 8) == (forward, len(seen) - forward)


def test_states_between_blocks_are_counted_as_they_are_kept():
    assert STATES_DTYPE.itemsize == CALIBRATION_STATE_BYTES


def test_the_peak_of_an_allocation_is_seen():
    before = anonymous_bytes()
    # Mapped afresh: an allocator could hand out pages that are resident already.
    block = mmap.mmap(-1, 50_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with PeakMemory(torch.device("cpu"), interval_s=0.001) as memory, block:
        block.write(b"x" * len(block))
        time.sleep(0.1)
    assert memory.peak_bytes - before >= 45_000_000
    assert memory.start_bytes == pytest.approx(before, rel=0.2)


def test_available_memory_is_a_plausible_number():
    assert 10_000_000 < available_bytes(torch.device("cpu")) < 10**14


def test_every_cgroup_above_the_process_counts(tmp_path):
    inner = tmp_path / "memory" / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder, limit, used in ((inner, 900, 100), (inner.parent, 500, 200)):
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    assert sorted(_left_in_cgroups(["4:memory:/outer/inner", "3:cpu:/outer"], tmp_path)) == [300, 800]
    (tmp_path / "memory.max").write_text("max\n")
    assert list(_left_in_cgroups(["0::/"], tmp_path)) == []
    (tmp_path / "memory.max").write_text("70\n")
    (tmp_path / "memory.current").write_text("30\n")
    assert list(_left_in_cgroups(["0::/"], tmp_path)) == [40]


@pytest.mark.parametrize(
    ("stat", "cached"),
    [
        ("anon 9\ninactive_file 20\nactive_file 3", 23),
        ("active_file 1\ntotal_inactive_file 5\ntotal_active_file 6", 11),
    ],
)
def test_files_that_a_cgroup_caches_are_free(tmp_path, stat, cached):
    for name, content in {"memory.max": "70", "memory.current": "50", "memory.stat": stat}.items():
        (tmp_path / name).write_text(content + "\n")
    assert list(_left_in_cgroups(["0::/"], tmp_path)) == [20 + cached]


def saved_bytes(config: BertConfig, ids: torch.Tensor) -> int:
    """Of all storages that autograd saves in the layers of an encoder that is trained, each once."""
    encoder = BertModel._from_config(config, dtype=torch.float32).encoder.requires_grad_(False).train()
    states, seen = torch.randn(*ids.shape, config.hidden_size, requires_grad=True), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage._cdata] = storage.nbytes()
        return tensor

    parameters = {parameter.untyped_storage()._cdata for parameter in encoder.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = encoder(states).last_hidden_state
    assert result.requires_grad
    return sum(size for key, size in seen.items() if key not in parameters)


def test_what_a_model_drops_itself_is_counted():
    """Of an encoder: masks, and the attention matrix, which no kernel with dropout does without."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 96}
    ids = torch.zeros(3, 32, dtype=torch.long)
    batches = MicroBatches(ids.numel(), 3, ids.shape[1], 1, 0, 0, 0)
    found, planned = [], []
    for share in (0.0, 0.1):
        config = BertConfig(**sizes, hidden_dropout_prob=share, attention_probs_dropout_prob=share, vocab_size=64)
        found.append(saved_bytes(config, ids))
        with torch.device("meta"):
            shape = shape_of(BertForSequenceClassification(config))
        run = RunShape(shape, batches, 0, 8, 4, QuantSpec(), "generic", "everything", SHAPE_RULES["cpu"])
        planned.append(kept_bytes(run))
    assert found[1] - found[0] > 4 * ids.numel() * sizes["num_attention_heads"] * ids.shape[1], "matrices are kept"
    assert 0.9 * (found[1] - found[0]) <= planned[1] - planned[0] <= 1.5 * (found[1] - found[0])
