"""What people know adapters to have, on both ways of computing a model: trained, resumed, read by PEFT, merged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from nybble import plan
from nybble.errors import ConfigError, NybbleError, RunError
from nybble.events import silent
from nybble.exporting.artefact import Artefact, write
from nybble.exporting.consumers import base_of_adapters
from nybble.exporting.gguf_model import read_gguf_adapter
from nybble.exporting.merged_source import MergedSource
from nybble.formats.quant_spec import BaseFormats
from nybble.layers.convert import adapters_of, attach_adapters, enable_adapters
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.options.adapter_groups import TAKES_FROM_BASE
from nybble.options.use_groups import ArtefactKind, GgufType
from nybble.options.verbs import load_config
from nybble.quantization.adapter_init import start_along_inputs
from nybble.quantization.folder import quantize_folder, save_dense_folder
from nybble.runs.open_run import OpenRun, load_frozen, load_tuned, open_run
from nybble.sources.load import load_model
from nybble.sources.open import open_model
from nybble.training.session import train

PATHS = {"blocks": {}, "generic": {"packing": False}}
OPTIONS: dict[str, dict[str, Any]] = {
    "patterns": {
        "rank_pattern": "layers.0.+q_proj=2,q_proj=6,mlp.down_proj=5",
        "alpha_pattern": {"k_proj": 3.0, "down_proj": 20.0},
        "rslora": True,
    },
    "lora-plus": {"lora_plus_ratio": 8, "optimizer_bits": 8, "page_optimizer": "always"},
}
OPTIONS["dora"] = {"dora": True, "rank_pattern": "up_proj=3", "lora_plus_ratio": 2}
OPTIONS["regularised"] = {"neftune_alpha": 5, "label_smoothing": 0.1, "z_loss": 1e-3}
OPTIONS |= {init: {"init": init, "lr": 1e-3} for init in ("eva", "pissa", "olora")}
QUICK = {("patterns", "blocks"), ("patterns",), ("lora-plus", "generic"), ("dora", "blocks"), ("regularised", "blocks")}
QUICK |= {("pissa", "generic"), ("eva", "blocks")}
TOKENS = torch.tensor([[70, 5, 33, 90, 12, 200, 41, 7, 8, 9]])


def _case(*case: str) -> Any:
    return pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)


@pytest.fixture
def start(tiny_model: Path, data: Path, tmp_path: Path) -> Callable[..., Path]:
    """Trains for some steps; returns the run folder."""

    def run(out: str = "run", **more: Any) -> Path:
        options = {"model": str(tiny_model), "data": str(data), "out": str(tmp_path / out), "rows_per_step": 6}
        options |= {"compute_dtype": "fp32", "lr": 5e-3, "max_steps": 3, "rank": 4, "quality": "absmax", "seed": 3}
        train(load_config(None, options | more))
        return tmp_path / out

    return run


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits.float()


def widened(opened: OpenRun) -> nn.Module:
    """The run's base as transformers loads it, its linears' weights put through four bits."""
    base = AutoModelForCausalLM.from_pretrained(opened.config.model.model, dtype=torch.float32)
    frozen = load_frozen(opened, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        for name, module in frozen.named_modules():
            if isinstance(module, QuantizedLinear):
                base.get_submodule(name).weight.copy_(module.dequantize(torch.float32))
        for end in (base.get_input_embeddings(), base.get_output_embeddings()):
            end.weight.copy_(end.weight.bfloat16())  # as they are kept
    return base


@pytest.mark.parametrize(("option", "path"), [_case(option, path) for option in OPTIONS for path in PATHS])
def test_trained_resumed_and_read_by_peft(start, tmp_path: Path, option: str, path: str) -> None:
    run = start(**OPTIONS[option], **PATHS[path], save_every=1, keep_checkpoints=9)
    opened, kept = open_run(run), {path.name: path.read_bytes() for path in (run / "adapter").glob("*.*")}
    ours = logits(load_tuned(opened, torch.float32, torch.device("cpu")))
    base, adapter = widened(opened), run / "adapter"
    assert (ours - logits(base)).norm() > 1e-2 * ours.norm(), "nothing was learnt"
    if option in TAKES_FROM_BASE:
        write(opened, Artefact(ArtefactKind.PEFT, GgufType.F16, "dequantized"), adapter := tmp_path / "peft")
        base = base_of_adapters(opened, torch.float32, silent)
    theirs = PeftModel.from_pretrained(base, adapter)
    torch.testing.assert_close(ours, logits(theirs), rtol=1e-4, atol=1e-4)

    shutil.rmtree(run / "checkpoints" / "step-3")
    train(load_config(run / "config.yaml", {"out": str(run), "resume": True}))
    assert {path.name: path.read_bytes() for path in (run / "adapter").glob("*.*")} == kept

    save_dense_folder(MergedSource(opened, "dequantized"), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(theirs.merge_and_unload()), rtol=0.03, atol=0.03)  # bf16


@pytest.mark.parametrize(
    "option", [_case(option) for option in OPTIONS if option != "regularised"]
)  # its noise differs
def test_both_ways_learn_the_same(start, option: str) -> None:
    first, second = (
        load_file(start(path, **OPTIONS[option], **PATHS[path]) / "adapter/adapter_model.safetensors") for path in PATHS
    )
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", pytest.param("olora", marks=pytest.mark.slow)])
def test_what_is_taken_from_the_base_is_pefts(start, tiny_model: Path, tmp_path: Path, init: str) -> None:
    """PEFT takes the same out of the 16-bit base, and its tuned model is ours where that is merged into."""
    run = start(init=init, lr=1e-3, alpha=8.0)
    opened = open_run(run)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, run / "adapter")
    save_dense_folder(MergedSource(opened, "original"), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(theirs), rtol=0.03, atol=0.03)  # bf16
    ours = load_tuned(opened, torch.float32, torch.device("cpu"))
    name, adapter = next(iter(adapters_of(ours).items()))
    kept = theirs.base_model.model.get_submodule(name).base_layer.weight
    loss = (adapter.base.dequantize(torch.float32) - kept).norm() / kept.norm()
    assert loss < 0.15, "the four bits are not of what PEFT leaves"
    enable_adapters(ours, False)
    exact = logits(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    assert (logits(ours) - exact).norm() < 0.2 * exact.norm(), "without its adapter the run is no longer the base"
    with pytest.raises(RunError, match="--to peft"):
        start("more", adapter=str(run))


def test_dora_has_pefts_gradients_on_four_bits(start) -> None:
    opened = open_run(start(dora=True, lr=2e-2))
    ours = load_tuned(opened, torch.float32, torch.device("cpu")).requires_grad_(False)
    theirs = PeftModel.from_pretrained(widened(opened), opened.run.adapter, is_trainable=True)
    adapters = adapters_of(ours)
    parameters = [p for each in adapters.values() for p in (each.lora_A, each.lora_B, each.magnitude)]
    for parameter in parameters:
        parameter.requires_grad_()
    for model in (ours, theirs):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for name, adapter in adapters.items():
        layer = theirs.base_model.model.get_submodule(name)
        other = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        other += (layer.lora_magnitude_vector["default"].weight,)
        for mine, its in zip((adapter.lora_A, adapter.lora_B, adapter.magnitude), other, strict=True):
            torch.testing.assert_close(mine.grad, its.grad, rtol=2e-3, atol=1e-6)
    assert json.loads(opened.run.plan.read_text())["chosen"]["path"].startswith(
        "generic path (decoder blocks have no DoRA)"
    )


@pytest.mark.parametrize(
    "clash",
    [
        {"dropout": 0.1},
        {"target_modules": "lm_head,q_proj"},
    ],
)
def test_dora_where_it_does_not_fit(start, clash: dict[str, Any]) -> None:
    with pytest.raises(NybbleError, match="dora"):
        start(dora=True, **clash)


def test_plans_know_dora_and_patterns(tiny_model: Path, tmp_path: Path) -> None:
    quantize_folder(open_model(str(tiny_model)), BaseFormats(), tmp_path / "four")
    plain, dora = (plan(model=str(tmp_path / "four"), rank=4, dora=dora).plans for dora in (False, True))
    reasons = {str(dora.reason(each)) for each in dora.rejected}
    assert any("--dora needs the rows of the whole base" in reason for reason in reasons), reasons
    pattern = plan(model=str(tmp_path / "four"), rank=4, rank_pattern={"down_proj": 6}).plans
    counts = [each.smallest.run.adapter_parameters for each in (plain, dora, pattern)]
    outputs = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)  # of two blocks: q, k, v, o, gate, up and down
    assert (counts[1] - counts[0], counts[2] - counts[0]) == (outputs, 2 * 2 * (128 + 64))
    assert (plain.smallest.run.path, dora.smallest.run.path) == ("blocks", "generic")


def test_eva_begins_along_the_largest_inputs(tiny_model: Path) -> None:
    source = open_model(str(tiny_model))
    model = load_model(source, None, torch.float32)
    name, inputs = "model.layers.1.mlp.down_proj", []
    attach_adapters(model, [name, "model.layers.0.self_attn.q_proj"], rank=3, alpha=6.0)
    windows = torch.randint(250, (6, 16), generator=torch.Generator().manual_seed(0))
    start_along_inputs(model, windows)
    adapter = adapters_of(model)[name]
    adapter.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].flatten(0, -2).detach()))
    model(input_ids=windows)
    expected = torch.linalg.svd(torch.cat(inputs), full_matrices=False).Vh[:3]
    cosines = (adapter.lora_A @ expected.T).abs()
    torch.testing.assert_close(cosines, torch.eye(3), rtol=1e-3, atol=1e-3)
    assert not adapter.lora_B.any()


@pytest.mark.parametrize("clash", [{"format": "none"}, {"quality": "calibrated"}, {"target_modules": "lm_head,q_proj"}])
def test_pissa_where_it_does_not_fit(start, clash: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="init is pissa"):
        start(init="pissa", **clash)


def test_ranks_and_alphas_are_those_that_peft_finds(start, tmp_path: Path) -> None:
    """And go into llama.cpp's file, which has one alpha and each layer's own rank."""
    opened = open_run(start(**OPTIONS["patterns"], max_steps=1))
    ours = adapters_of(load_tuned(opened, torch.float32, torch.device("cpu")))
    theirs = PeftModel.from_pretrained(widened(opened), opened.run.adapter)
    for name, adapter in ours.items():
        layer = theirs.base_model.model.get_submodule(name)
        assert (layer.r["default"], layer.scaling["default"]) == (adapter.rank, adapter.scaling)
    assert {adapter.rank for adapter in ours.values()} == {2, 4, 5, 6}
    for kind in (ArtefactKind.GGUF_ADAPTER, ArtefactKind.PEFT):
        write(opened, Artefact(kind, GgufType.F16, "dequantized"), tmp_path / kind)
    alpha, matrices = read_gguf_adapter(tmp_path / "gguf-lora" / "adapter.gguf", opened.source)
    for name, adapter in ours.items():
        a, b = matrices[name]
        torch.testing.assert_close(alpha / len(a) * b @ a, adapter.scaling * adapter.lora_B @ adapter.lora_A)
    folded = PeftModel.from_pretrained(widened(opened), tmp_path / "peft")
    torch.testing.assert_close(logits(folded), logits(theirs))


@pytest.mark.parametrize(
    ("pattern", "why"), [("qproj=8", "matches no adapter"), ("q_proj=8,layers.0.*q_proj=4", "an earlier pattern")]
)
def test_a_pattern_that_decides_nothing_is_refused(start, pattern: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        start(rank_pattern=pattern)
