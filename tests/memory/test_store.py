"""A base streamed from its folder: the same bits as in memory, one read a block and pass, errors before the update."""

import json
import os
import random
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from late_lane import LateLane
from tiny import make_four_bit_model
from transformers import PhiConfig, PhiForCausalLM

from nybble.data.packing import pack_tokens
from nybble.errors import ModelError
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.layers import own_head
from nybble.layers.backbone import FusedForward, ModuleForward
from nybble.layers.convert import adapters_of, attach_adapters, resolve_targets
from nybble.memory.lane import lane_to
from nybble.memory.offload import ActivationFile, PinnedActivations
from nybble.memory.store import open_store, spread
from nybble.options.verbs import load_config
from nybble.quantization.folder import quantize_folder
from nybble.sizes import SHAPE_RULES
from nybble.sources.load import load_model
from nybble.sources.open import open_model
from nybble.training.session import train

TOKENS = 37


@pytest.fixture(scope="module", params=["nf4", "int4_asym", "nf3", "nf2"])
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("synth") / request.param
    make_four_bit_model(path, QuantSpec(request.param, double_quant=request.param == "nf4"))
    return path


# Of tests of what does not depend on the layout of a block's bytes.
one_format = pytest.mark.parametrize("folder", ["nf4"], indirect=True)


def gradients(
    folder, resident, stream_ends=False, dtype=torch.bfloat16, passes=2, between=None,
    keep="nothing", generic=False, device="cpu", in_ram=False, kept=None,
):  # fmt: skip
    """Loss and adapter gradients of two micro-batches; `resident` None loads the whole base."""
    source = open_model(str(folder))
    store = None if resident is None else open_store(source, resident, device, in_ram=in_ram)
    names = () if store is None else store.names
    model = load_model(source, source.layer_formats, dtype, device, stream_linears_of=names, stream_ends=stream_ends)
    attach_adapters(model, resolve_targets(model, "all-linear"), rank=4, alpha=8, seed=1)
    for adapter in adapters_of(model).values():
        torch.nn.init.normal_(adapter.lora_B, std=0.01, generator=torch.Generator().manual_seed(2))
    if generic:
        model.train()
        forward = ModuleForward(model, "packed", checkpointing=keep == "nothing", store=store, kept=kept)
    else:
        forward = FusedForward(model, keep, store, kept)
    head = own_head.loss_head(model)
    ids = torch.arange(TOKENS).remainder(250) + 3
    batch, ids, positions = pack_tokens([ids]).to(device), ids.to(device), torch.arange(TOKENS, device=device)
    losses = []
    for _ in range(passes):
        loss = head.loss(forward.hidden(batch, positions), ids, TOKENS)
        loss.backward()
        losses.append(loss.item())
        if between is not None:
            between()
    return losses, [p.grad for p in model.parameters() if p.requires_grad], store


@pytest.fixture(scope="module")
def in_memory(folder):
    """Losses and gradients with the whole base in memory, computed once for each of the options."""

    @cache
    def compute(**options):
        losses, grads, _ = gradients(folder, None, **options)
        return losses, grads

    return compute


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("resident", [0, 1, 3, 4])
def test_streaming_changes_no_bit(folder, in_memory, resident, dtype):
    expected, expected_grads = in_memory(dtype=dtype)
    losses, grads, store = gradients(folder, resident, stream_ends=True, dtype=dtype)
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))
    if resident == 0:  # up 0 1 2 3, down 1 0, up 2 3, down 1 0: the last two are still there where the way turns
        assert store.block_reads == 10


@one_format
@pytest.mark.parametrize("keep", ["nothing", "everything"])
@pytest.mark.parametrize("resident", [0, 3])
def test_streaming_through_transformers_own_modules_changes_no_bit(folder, in_memory, tmp_path, resident, keep):
    """And what is kept goes to a file or to memory beside, with no other result."""
    expected, expected_grads = in_memory(generic=True, keep=keep)
    for kept in (None, ActivationFile(tmp_path, 10), PinnedActivations(LateLane(), 10, 12_500)):
        losses, grads, _ = gradients(folder, resident, stream_ends=True, generic=True, keep=keep, kept=kept)
        assert losses == expected
        assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


@one_format
def test_a_store_in_host_memory_reads_its_folder_once(folder, in_memory, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    expected, _ = in_memory()
    losses, _, store = gradients(copy, 1, in_ram=True, between=lambda: os.truncate(copy / "model.safetensors", 0))
    assert losses == expected and store.block_reads > 4


@pytest.mark.gpu
@pytest.mark.parametrize("keep", ["nothing", "everything"])
@pytest.mark.parametrize("in_ram", [False, True])
@pytest.mark.parametrize("resident", [0, 1, 3])
def test_streaming_to_a_gpu_changes_no_bit(folder, in_memory, resident, in_ram, keep):
    expected, expected_grads = in_memory(generic=True, keep=keep, device="cuda", passes=4)
    for kept in (None, PinnedActivations(lane_to(torch.device("cuda")), 10, 12_500)):
        losses, grads, _ = gradients(
            folder, resident, stream_ends=True, generic=True, keep=keep, device="cuda", in_ram=in_ram, kept=kept,
            passes=4,
        )  # fmt: skip
        assert losses == expected
        assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


def test_a_streamed_head_keeps_its_bias(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    whole = PhiForCausalLM(PhiConfig(vocab_size=90, max_position_embeddings=32, **sizes)).eval()
    whole.lm_head.bias.data = torch.randn(90).bfloat16().float()  # ends stay in 16 bits
    whole.save_pretrained(tmp_path)
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        expected, states = whole(input_ids=ids).logits, whole.model(input_ids=ids).last_hidden_state
    model = load_model(open_model(str(tmp_path)), None, torch.float32, stream_ends=True)
    assert torch.allclose(model.lm_head(states), expected, atol=1e-5)
    assert torch.allclose(own_head.loss_head(model).logits(states[0]), expected[0], atol=1e-5)


@one_format
def test_a_large_head_is_computed_in_panels_streamed_or_not(folder, in_memory, monkeypatch):
    whole, _ = in_memory()
    panels = replace(SHAPE_RULES["cpu"], large_head_bytes=1, panel_bytes=2 * 64 * 320)
    monkeypatch.setitem(SHAPE_RULES, "cpu", panels)  # of 1,024 rows: three panels and a part
    expected, expected_grads, _ = gradients(folder, None)
    losses, grads, _ = gradients(folder, 1, stream_ends=True)
    assert losses == expected and expected == pytest.approx(whole, rel=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


@one_format
@pytest.mark.parametrize(
    ("fault", "words"), [("shorten", "ends at byte"), ("fail", "Input/output"), ("lose", "No such")]
)
def test_a_folder_that_fails_stops_the_pass_before_there_are_gradients(folder, tmp_path, fault, words):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = copy / "model.safetensors"

    def spoil():
        if fault == "shorten":
            os.truncate(weights, weights.stat().st_size // 3)
            return
        weights.rename(tmp_path / "moved")
        if fault == "fail":
            weights.symlink_to("/proc/self/mem")  # nothing lies at the addresses that the file is read at: EIO

    with pytest.raises(ModelError, match=words):
        gradients(copy, 0, between=spoil)


@pytest.mark.parametrize("resident", [0, 1, 3])
def test_whatever_the_order_each_layer_has_its_own_bytes(folder, resident):
    """As after passes that broke off: what was read ahead is not what is asked for next."""
    source, dice = open_model(str(folder)), random.Random(0)
    store = open_store(source, resident)
    expected = {name: source.read(f"{name}.weight") for name in store.names}
    for _ in range(300):
        if dice.random() < 0.2:
            store.begin(will_return=dice.random() < 0.5)
        name = dice.choice(store.names)
        for got in (store.fetch(name), store.fetch(name)):
            assert torch.equal(got.packed, expected[name].packed) and torch.equal(got.scales, expected[name].scales)


def test_resident_blocks_are_spread():
    assert spread(0, 5) == [] and spread(5, 5) == [0, 1, 2, 3, 4]
    assert spread(2, 6) == [2, 5]


def test_a_whole_run_streamed_and_paged_equals_a_resident_one(data, tmp_path):
    folder = tmp_path / "model"
    make_four_bit_model(folder)
    digests = {}
    for name, options in {
        "resident": {"keep": "attention"},
        "streamed": {
            "stream_base": "always",
            "page_optimizer": "always",
            "offload_activations": "always",
            "keep": "attention",
        },
    }.items():
        given = {"model": folder, "data": data, "out": tmp_path / name, "max_steps": 3, "rank": 2, "rows_per_step": 4}
        config = load_config(None, {key: str(value) for key, value in given.items()} | options)
        train(config)
        digests[name] = (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        plan = json.loads((tmp_path / name / "plan.json").read_text())
        assert (plan["chosen"]["resident_blocks"] is not None) == (name == "streamed")
        assert plan["chosen"]["paged"] == plan["chosen"]["offloaded"] == (name == "streamed")
        assert plan["chosen"]["peak_bytes"] == sum(plan["chosen"]["components"].values())
    assert digests["resident"] == digests["streamed"]


def test_a_mixed_folder_streams_each_layer_in_its_own_format(tiny_model, data, tmp_path):
    source = open_model(str(tiny_model))
    formats = BaseFormats(QuantSpec(), {name: ("nf4", "nf3", "nf2")[i % 3] for i, name in enumerate(source.linears)})
    quantize_folder(source, formats, tmp_path / "mixed")
    quantize_folder(source, BaseFormats(), tmp_path / "nf4")
    digests, base_bytes = {}, {}
    for name, model, stream in (("whole", "mixed", "never"), ("streamed", "mixed", "always"), ("four", "nf4", "never")):
        given = {"model": tmp_path / model, "data": data, "out": tmp_path / name, "max_steps": 1, "rows_per_step": 2}
        options = {"stream_base": stream, "keep": "attention"}
        train(load_config(None, {key: str(value) for key, value in given.items()} | options))
        digests[name] = (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        plan = json.loads((tmp_path / name / "plan.json").read_text())
        assert (plan["chosen"]["resident_blocks"] is not None) == (name == "streamed")
        base_bytes[name] = plan["chosen"]["components"].get("base weights", 0)
    assert digests["whole"] == digests["streamed"] != digests["four"]
    model = load_model(open_model(str(tmp_path / "mixed")), BaseFormats(), torch.float32)
    held = sum(model.get_submodule(name).quantized().nbytes for name in source.linears)
    assert base_bytes["whole"] == pytest.approx(held, rel=1e-3) and held < base_bytes["four"]
