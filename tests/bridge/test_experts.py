"""PEFT's adapters on experts in few bits (`target_parameters`), against the same on the dense matrices."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import FAMILIES, make_mixture
from peft import LoraConfig, PeftModel
from peft_models import adapted
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import nybble
import nybble.hf
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.layers.experts_weight import ExpertsWeight
from nybble.layers.few_bit_tensor import FewBitTensor
from nybble.layers.quantized_experts import expert_shapes
from nybble.runs.adapter_files import read_adapter
from nybble.runs.adapter_writing import adapter_config, write_adapter
from nybble.sources.folder import FolderSource
from nybble.sources.load import load_model

DEFAULT = ("qwen2_moe", "gpt_oss")  # a shared expert; biases, matrices turned
IDS = torch.randint(5, 250, (2, 9), generator=torch.Generator().manual_seed(1))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=nybble.NybbleConfig(), dtype=torch.float32, attn_implementation="eager"
    )


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2_moe")
    make_mixture("qwen2_moe", folder)
    return folder


def dense_twin(model: Any) -> Any:
    """The same with dense parameters and transformers' own code over them."""
    twin = copy.deepcopy(model)
    for name, parameter in list(twin.named_parameters()):
        if isinstance(parameter, FewBitTensor):
            owner, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(owner), leaf, nn.Parameter(parameter.dense(), requires_grad=False))
    twin.set_experts_implementation("eager")
    return twin


def config(base: Any, **options: Any) -> LoraConfig:
    """Adapters on attention and all experts."""
    attention = [name for name, module in base.named_modules() if "attn" in name and isinstance(module, nn.Linear)]
    given = {"r": 3, "lora_alpha": 6, "target_modules": attention, "target_parameters": list(expert_shapes(base))}
    return LoraConfig(**given | options)


def adapt(base: Any, **options: Any) -> Any:
    return adapted(base, config(base, **options))


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.train()
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_close(one: Tensor, other: Tensor) -> None:
    assert float((one - other).norm()) <= 2e-5 * max(1.0, float(other.norm()))


@pytest.mark.parametrize(
    "model_type", [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_steps_and_saved_adapters_are_pefts(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_mixture(model_type, tmp_path / "base")
    base = load(tmp_path / "base")
    assert expert_shapes(base) and all(
        isinstance(base.get_parameter(name), ExpertsWeight) for name in expert_shapes(base)
    )
    twin, model = dense_twin(base), adapt(base, rank_pattern={"experts.down_proj": 2})
    model.save_pretrained(tmp_path / "adapter")
    twin = PeftModel.from_pretrained(twin, tmp_path / "adapter", is_trainable=True)

    def forbidden(*_: Any) -> Tensor:
        raise AssertionError("experts are made dense, all of them at once")

    with monkeypatch.context() as patched:
        patched.setattr(ExpertsWeight, "dense", forbidden)
        loss, gradients = step(model)
    expected, expected_gradients = step(twin)
    torch.testing.assert_close(loss, expected)
    assert gradients.keys() == expected_gradients.keys()
    assert any("experts" in name and gradient.norm() > 0 for name, gradient in gradients.items())
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name])
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(IDS).logits, base(IDS).logits)

    again = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS).logits, model.eval()(IDS).logits)
    ours = load_model(FolderSource(tmp_path / "base", "base"), BaseFormats(QuantSpec()), torch.float32)
    read_adapter(ours, tmp_path / "adapter")
    for mine, theirs in ((ours.get_input_embeddings(), again), (ours.get_output_embeddings(), again)):
        name = "get_input_embeddings" if mine is ours.get_input_embeddings() else "get_output_embeddings"
        getattr(theirs, name)().weight.data = mine.weight.detach().float()  # a run keeps them in bf16
    with torch.no_grad():
        assert_close(ours(IDS).logits, again(IDS).logits)
    (tmp_path / "ours").mkdir()
    write_adapter(ours, tmp_path / "ours", adapter_config(ours, "base"))
    back = PeftModel.from_pretrained(again.unload(), tmp_path / "ours")
    with torch.no_grad():
        assert_close(back(IDS).logits, ours(IDS).logits)


def test_under_autocast_and_with_checkpoints(mixture: Path) -> None:
    model = adapt(load(mixture))
    for module in model.modules():
        if hasattr(module, "top_k"):
            module.top_k = module.num_experts  # rounding sends no token elsewhere
    loss, gradients = step(model)
    model.enable_input_require_grads()
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    again, recomputed = step(model)
    assert torch.equal(again, loss)
    for name, gradient in recomputed.items():
        torch.testing.assert_close(gradient, gradients[name])
    with torch.autocast("cpu", torch.bfloat16):
        rough, rounded = step(model)
    torch.testing.assert_close(rough, loss, rtol=2e-2, atol=2e-2)
    for name, gradient in rounded.items():
        assert (gradient - gradients[name]).norm() < 0.1 * gradients[name].norm() + 1e-3, name


@pytest.mark.filterwarnings("ignore:.*rounded to nf4 again")
def test_two_adapters_at_once_and_merging(mixture: Path) -> None:
    base = load(mixture)
    model = adapt(base)
    model.add_adapter("other", config(base, r=2, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    twin = dense_twin(model)
    loss, gradients = step(model)
    expected, expected_gradients = step(twin)
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name])
    for each in (model, twin):
        each.set_adapter("default")
    with pytest.warns(UserWarning, match="rounded to nf4 again"):
        merged = model.merge_and_unload()
    sums = twin.merge_and_unload()
    for name in expert_shapes(base):
        parameter, was = merged.get_parameter(name), base.get_parameter(name)
        assert torch.equal(parameter.packed, was.rounded(sums.get_parameter(name)).packed)
        assert not torch.equal(parameter.packed, was.packed)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=str)
def test_what_experts_cannot_have_is_refused(mixture: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"does not work with {next(iter(options))}"):
        adapt(load(mixture), **options)


def test_a_step_without_adapters_gives_what_dense_experts_give(mixture: Path) -> None:
    base = load(mixture)
    asked: list[Callable[..., Any]] = [base, dense_twin(base)]
    with torch.no_grad():
        assert_close(*(each(IDS).logits for each in asked))
