"""What people know adapters to have, on both ways of computing a model: trained, resumed, read by PEFT, merged."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import put_into_four_bits
from torch import nn
from transformers import AutoModelForCausalLM

from nybble import plan
from nybble.data.examples import EncodedExample
from nybble.data.packing import collate
from nybble.errors import ConfigError, NybbleError, RunError
from nybble.events import silent
from nybble.exporting.artefact import Artefact, write
from nybble.exporting.consumers import base_of_adapters
from nybble.exporting.gguf_model import read_gguf_adapter
from nybble.exporting.merged_source import MergedSource
from nybble.formats.quant_spec import BaseFormats
from nybble.layers.augmented import AugmentedProjection
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import (
    adapters_of,
    attach_adapters,
    enable_adapters,
    new_adapter_sizes,
    resolve_targets,
)
from nybble.layers.projection import DenseWeights, Projection
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.options.adapter_groups import TAKES_FROM_BASE
from nybble.options.use_groups import ArtefactKind, GgufType
from nybble.options.verbs import load_config
from nybble.quantization.adapter_init import share_out, shared_out_ranks, start_along_inputs
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
OPTIONS["eva"] |= {"eva_rho": 3, "rank_pattern": "q_proj=2", "alpha": 8}
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


@pytest.mark.parametrize("keep", ["everything", None])
def test_dora_has_pefts_loss_and_gradients_on_four_bits(start, keep: str | None) -> None:
    """Through decoder blocks, and through transformers' modules, where adapters scale what the layer gave."""
    opened = open_run(start(dora=True, lr=2e-2, target_modules="q_proj,o_proj,up_proj,down_proj"))
    ours = load_tuned(opened, torch.float32, torch.device("cpu")).requires_grad_(False)
    theirs = PeftModel.from_pretrained(widened(opened), opened.run.adapter, is_trainable=True)
    adapters = adapters_of(ours)
    for parameter in (parameter for each in adapters.values() for parameter in each.trained()):
        parameter.requires_grad_()
    rows = [EncodedExample(TOKENS[0, :n].int(), torch.ones(n, dtype=torch.bool), "") for n in (10, 6)]
    batch = collate(rows, packed=keep is not None)
    causal_lm = CausalLM.of(ours, packing=keep is not None, keep=keep or "nothing")
    assert causal_lm.name.startswith("decoder blocks" if keep else "generic path")
    loss = causal_lm.loss(batch, batch.supervised_tokens)
    expected = sum(theirs(input_ids=TOKENS[:, :n], labels=TOKENS[:, :n]).loss * (n - 1) / 14 for n in (10, 6))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    for name, adapter in adapters.items():
        layer = theirs.base_model.model.get_submodule(name)
        other = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        other += (layer.lora_magnitude_vector["default"].weight,)
        for mine, its in zip(adapter.trained(), other, strict=True):
            assert (mine.grad - its.grad).norm() <= 1e-5 * its.grad.norm(), name


@pytest.mark.parametrize("own_class", [Projection, AugmentedProjection])
@pytest.mark.parametrize("dense", [False, True])
def test_dora_in_a_projection_is_the_formula(own_class: type[Projection], dense: bool) -> None:
    """One layer has no adapter, one has a bias; autograd over the sum of the matrices decides."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"block": nn.ModuleList([nn.ModuleDict({n: nn.Linear(32, 16, n == "b") for n in "abc"})])})
    if not dense:
        put_into_four_bits(model)
    adapters = attach_adapters(model, ["block.0.a", "block.0.b"], rank=3, alpha=6.0, dora=True)
    for adapter in adapters.values():
        nn.init.normal_(adapter.lora_B, std=0.1)
        nn.init.normal_(adapter.magnitude, mean=1.0, std=0.3)
    projection = own_class([model.get_submodule(f"block.0.{name}") for name in "abc"], DenseWeights())
    x, grad = torch.randn(7, 32), torch.randn(7, 48)

    expected, seen = [], x.clone().requires_grad_()
    for linear, adapter in zip(projection.linears, projection.adapters, strict=True):
        weight = linear.weight.detach() if dense else linear.dequantize(torch.float32)
        if adapter is not None:
            weight = weight + adapter.scaling * adapter.lora_B @ adapter.lora_A
            weight = adapter.magnitude[:, None] * weight / weight.detach().norm(dim=1, keepdim=True)
        expected.append(seen @ weight.T + (0 if linear.bias is None else linear.bias.detach()))
    torch.cat(expected, dim=1).backward(grad)

    rows = x.new_zeros(7, projection.in_width)
    rows[:, :32] = x
    z = projection.low_rank(rows)
    assert z is not None
    y = projection.forward(rows, z)[:, :48]
    torch.testing.assert_close(y, torch.cat(expected, dim=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(projection.forward(rows, z, residual=grad), y + grad, rtol=1e-5, atol=1e-5)
    given = projection.gradient(grad)
    grad_z = projection.backward_low_rank(given)
    gradients = projection.backward_adapters(given, grad_z, rows, z)
    for parameter, gradient in zip(projection.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)
    again = projection.backward_adapters(given, grad_z, rows, z, projection.for_magnitudes(projection.forward(rows, z)))
    for gradient, other in zip(gradients, again, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(projection.backward_input(given, grad_z)[:, :32], seen.grad, rtol=1e-4, atol=1e-5)

    for adapter in adapters.values():
        adapter.switch(False)
    assert projection.low_rank(rows) is None
    plain = torch.cat([linear(x) for linear in projection.linears], dim=1)
    torch.testing.assert_close(projection.forward(rows, None)[:, :48], plain, rtol=1e-5, atol=1e-5)


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
    assert plain.smallest.run.path == dora.smallest.run.path == "blocks"
    assert dora.smallest.peak_bytes > plain.smallest.peak_bytes


def test_eva_gives_ranks_to_what_explains_most(start, tiny_model: Path) -> None:
    shares = {"a": torch.tensor([0.5, 0.2, 0.1]), "b": torch.tensor([0.5, 0.4, 0.3]), "c": torch.tensor([0.05, 0.01])}
    assert share_out(shares, 3) == {"a": 1, "b": 2, "c": 0}
    source = open_model(str(tiny_model))
    model = load_model(source, None, torch.float32)
    adapters = attach_adapters(model, resolve_targets(model, "all-linear"), rank=3, alpha=6.0)
    inputs: dict[str, torch.Tensor] = {}
    for name, adapter in adapters.items():
        adapter.register_forward_pre_hook(
            lambda _, arguments, name=name: inputs.__setitem__(name, arguments[0].flatten(0, -2).detach())
        )
    windows = torch.randint(250, (1, 64), generator=torch.Generator().manual_seed(0))
    model(input_ids=windows)
    found = shared_out_ranks(model, windows, rho=2.0)
    ranked = []
    for name in adapters:
        squares = torch.linalg.svdvals(inputs[name].double()).square()
        ranked += [(-share, name) for share in (squares / squares.sum())[:6].tolist()]
    best = [name for _, name in sorted(ranked, key=lambda each: each[0])[: 3 * len(adapters)]]
    assert sum(found.values()) == 3 * len(adapters) and max(found.values()) <= 6
    assert max(abs(found[name] - best.count(name)) for name in adapters) <= 1  # q, k and v have the same: ties

    opened = open_run(start(**OPTIONS["eva"]))
    kept = opened.config.adapters.model_copy(update={"eva_rho": 1.0})
    ranks = [each.rank for each in adapters_of(load_tuned(opened, torch.float32, torch.device("cpu"))).values()]
    given = [size for size, _ in new_adapter_sizes(source.skeleton, kept).values()]
    assert sum(ranks) == sum(given) and sorted(ranks) != sorted(given)


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
