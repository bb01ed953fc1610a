"""PEFT on models in few bits, against the same adapters on the dense matrices that they stand for."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from peft_models import adapted
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import nybble
import nybble.hf
from nybble.kernels.ops.four_bit import quantize
from nybble.layers.quantized_weight import QuantizedWeight

IDS = torch.arange(24).view(2, 12)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.3},
    "dora": {"use_dora": True},
    "dora with dropout": {"use_dora": True, "lora_dropout": 0.3},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 32}},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Any:
    return nybble.quantize_(AutoModelForCausalLM.from_pretrained(tiny_model))


def dense_twin(model: nn.Module) -> Any:
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, QuantizedWeight):
            module.weight = nn.Parameter(module.weight.dense(torch.float32), requires_grad=False)
    return twin


def adapt(base: Any, seed: int = 0, **options: Any) -> Any:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    return adapted(base, config, seed)


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a training step."""
    model.train()
    torch.manual_seed(1)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_steps_agree(one: Any, other: Any) -> None:
    (loss, grads), (expected, expected_grads) = step(one), step(other)
    torch.testing.assert_close(loss, expected)
    assert grads.keys() == expected_grads.keys() and all(g is not None for g in grads.values())
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*rounded to nf4 again")  # pissa leaves less in the base
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_over_dense_weights(base: Any, kind: str) -> None:
    model = adapt(base, **KINDS[kind])
    assert sum(isinstance(p, QuantizedWeight) for p in model.parameters()) == 14
    assert_steps_agree(model, dense_twin(model))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_with_checkpoints_and_what_peft_prepares(base: Any, use_reentrant: bool) -> None:
    prepared = copy.deepcopy(base).bfloat16()
    kwargs = {"use_reentrant": use_reentrant}
    prepared = prepare_model_for_kbit_training(prepared, gradient_checkpointing_kwargs=kwargs)
    assert prepared.is_gradient_checkpointing and {p.dtype for p in prepared.parameters()} == {torch.float32}
    model = adapt(prepared, lora_dropout=0.2)
    assert model.base_model.model.is_gradient_checkpointing
    twin = dense_twin(model)
    twin.base_model.model.gradient_checkpointing_disable()
    assert_steps_agree(model, twin)


def test_training_evaluating_and_training_gives_the_same_gradients(base: Any) -> None:
    model = adapt(base)
    _, first = step(model)
    first = {name: grad.clone() for name, grad in first.items()}
    model.zero_grad()
    model.eval()
    with torch.no_grad():
        model(IDS)
    _, second = step(model)
    assert all(torch.equal(first[name], grad) for name, grad in second.items())


def test_several_adapters_and_none(base: Any) -> None:
    model = adapt(base)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.eval()
    twin = dense_twin(model)
    plain = base.eval()(IDS).logits
    seen = []
    for name in ("default", "other"):
        for each in (model, twin):
            each.set_adapter(name)
        seen.append(model(IDS).logits)
        torch.testing.assert_close(seen[-1], twin(IDS).logits)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, plain)
    assert not torch.equal(*seen)
    rows = [each(IDS, adapter_names=["default", "other"]).logits for each in (model, twin)]
    torch.testing.assert_close(*rows)


@pytest.mark.parametrize("kind", ["plain", "rslora", "dora"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_rounds_the_sum_and_says_so(base: Any, kind: str, safe_merge: bool) -> None:
    model = adapt(base, **KINDS[kind]).eval()
    twin = dense_twin(model)
    adapted, plain = model(IDS).logits, base.eval()(IDS).logits
    twin.merge_adapter(safe_merge=safe_merge)
    layer, expected = (each.base_model.model.model.layers[0].mlp.up_proj for each in (model, twin))
    with pytest.warns(UserWarning, match="rounded to nf4 again"):
        model.merge_adapter(safe_merge=safe_merge)
    merged = expected.base_layer.weight
    rounded = quantize(merged.detach(), layer.base_layer.weight.q.spec)
    assert torch.equal(layer.base_layer.weight.packed, rounded.packed)
    far = (model(IDS).logits - adapted).norm()
    assert far < 0.5 * (adapted - plain).norm(), "the merged model answers as the adapted one, but for rounding"
    with pytest.warns(UserWarning, match="unmerging does not bring back"):
        model.unmerge_adapter()
    assert (model(IDS).logits - adapted).norm() < 0.6 * (adapted - plain).norm()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = model.merge_and_unload()
    assert not any("lora" in name for name, _ in whole.named_modules())
    assert isinstance(whole.model.layers[0].mlp.up_proj.weight, QuantizedWeight)


@pytest.mark.filterwarnings("ignore:.*rounded to nf4 again")
def test_merging_into_a_loaded_folder_leaves_its_files_alone(base: Any, tmp_path: Path) -> None:
    base.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = adapt(AutoModelForCausalLM.from_pretrained(tmp_path))
    plain = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.packed.clone()
    model.merge_adapter()
    assert not torch.equal(model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.packed, plain)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("kind", ["plain", "rslora", "dora", "patterns"])
def test_adapters_are_saved_read_and_trained_on(base: Any, tmp_path: Path, kind: str) -> None:
    model = adapt(base, **KINDS[kind]).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert torch.equal(again.eval()(IDS).logits, model(IDS).logits)
    learning = {name for name, p in again.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in name for name in learning)
    assert_steps_agree(again, dense_twin(again))


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}], ids=["plain", "rslora", "dora"])
def test_adapters_move_both_ways(tiny_model: Path, data: Path, tmp_path: Path, options: dict[str, bool]) -> None:
    given = {"model": tiny_model, "data": data, "max_seq_len": 64, "max_steps": 2, "rank": 4, "lr": 5e-3}
    run = nybble.train(out=tmp_path / "run", quality="absmax", **given, **options)
    ours = nybble.open_run(run, compute_dtype="fp32")._model
    base = nybble.quantize_(AutoModelForCausalLM.from_pretrained(tiny_model))
    for end in (base.get_input_embeddings(), base.get_output_embeddings()):
        end.weight.data = end.weight.data.bfloat16().float()  # as a run keeps them
    theirs = PeftModel.from_pretrained(base, run.adapter, is_trainable=True)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(IDS).logits, ours.eval()(IDS).logits, rtol=1e-4, atol=1e-5)
    assert step(theirs)[0] > 0
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data -= 0.05 * parameter.grad
    theirs.save_pretrained(tmp_path / "theirs")
    given |= {"max_steps": 1, "lr": 1e-9}
    on = nybble.train(out=tmp_path / "on", adapter=tmp_path / "theirs", quality="absmax", **given)
    back = nybble.open_run(on, compute_dtype="fp32")._model
    with torch.no_grad():
        torch.testing.assert_close(back.eval()(IDS).logits, theirs.eval()(IDS).logits, rtol=1e-4, atol=1e-4)


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(nybble.NybbleError) as caught:
        act()
    return str(caught.value)


def test_a_four_bit_module_cannot_be_saved_whole(base: Any) -> None:
    said = refused(lambda: adapt(base, modules_to_save=["up_proj"]))
    assert "skip_modules" in said
