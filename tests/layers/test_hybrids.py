"""Models whose layers carry a state from token to token: what rows see of each other, and what is in four bits."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from hybrids import CONFIGS, hybrid
from own_gradients import examples, own_loss_and_gradients, relative, trained_loss_and_gradients
from peft import LoraConfig, get_peft_model

from nybble.errors import ConfigError, ModelError
from nybble.generation.generate import generate
from nybble.layers import mixers, recurrence
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import describe_untouched, quantizable_linears, resolve_targets, untouched_linears
from nybble.layers.probe import Part
from nybble.runs.adapter_files import read_adapter
from nybble.units import format_bytes

ROWS = (9, 21)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_row_of_a_batch_sees_another(name: str) -> None:
    model, rows = hybrid(name), examples(ROWS)
    loss, gradients = own_loss_and_gradients(model, rows)
    causal_lm = CausalLM.of(model)
    ours, our_gradients = trained_loss_and_gradients(causal_lm, rows)
    assert ours == pytest.approx(loss, rel=2e-6)
    assert relative(our_gradients, gradients) <= 1e-5
    assert causal_lm.packed, causal_lm.name
    padded = CausalLM.of(model, packing=False)
    ours, our_gradients = trained_loss_and_gradients(padded, rows)
    assert ours == pytest.approx(loss, rel=2e-6) and relative(our_gradients, gradients) <= 1e-5


def test_where_rows_would_see_each_other_they_are_padded_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a mixer that nybble does not compute: transformers' own code lets rows see each other."""
    monkeypatch.delitem(mixers.FORWARDS, "JambaMambaMixer")
    causal_lm = CausalLM.of(hybrid("jamba"))
    refused = dict(causal_lm.verdict.layouts_refused)
    assert refused["packed"].part is Part.PACKING and "rows are padded, since packed ones differ" in causal_lm.name


@pytest.mark.parametrize("name", CONFIGS)
def test_answers_of_several_prompts_are_those_of_each_alone(name: str) -> None:
    model = hybrid(name)
    prompts = [row.input_ids.tolist() for row in examples((3, 11))]
    alone = []
    for prompt in prompts:
        ids = torch.tensor(prompt)[None]
        for _ in range(5):  # without a cache: the whole text again for each token
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        alone.append(ids[0, len(prompt) :].tolist())
    assert generate(model, prompts, stop_ids=[], max_new_tokens=5) == alone


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"jamba", "mamba"}))  # which do not hand them on
def test_borders_of_rows_reach_every_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all kernels are there, transformers hands them the borders; its own fallback says that it cannot."""
    model = hybrid(name)
    packages = recurrence.kernel_packages(model)
    assert packages and not any(packages.values()), "a package of kernels is installed: this test needs the fallback"
    for module in (recurrence, mixers):
        monkeypatch.setattr(module, "kernel_packages", lambda model: dict.fromkeys(packages, True))
    with pytest.raises(ModelError, match="keep packed sequences apart"):
        CausalLM.of(model)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("qwen3_5_text", {"in_proj_a", "in_proj_b"}),
        ("qwen3_next", {"in_proj_ba"}),
        ("lfm2", set()),
        ("jamba", {"x_proj", "dt_proj"}),
        ("mamba", {"x_proj", "dt_proj"}),
        ("falcon_h1", set()),
        ("mamba2", set()),
    ],
)
def test_what_steers_a_state_stays_and_is_named_with_its_bytes(name: str, kept: set[str]) -> None:
    model = hybrid(name, adapters=False)
    untouched = untouched_linears(model)
    assert {each.rpartition(".")[2] for each in untouched} == kept
    assert not untouched.keys() & set(quantizable_linears(model))
    said = "\n".join(describe_untouched(model))
    for leaf in kept:
        of_leaf = [model.get_submodule(each) for each in untouched if each.endswith(f".{leaf}")]
        size = sum(parameter.nbytes for linear in of_leaf for parameter in linear.parameters())
        assert f"{len(of_leaf)} x {leaf} ({format_bytes(size)}) stays" in said
    assert "carry a state: " in said and "computed by PyTorch, without causal_conv1d" in said


@pytest.mark.parametrize("name", ["bamba", "mamba2"])
def test_no_weight_is_handed_to_a_fused_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels are installed transformers' forward has one for training mode, past few bits and adapters."""
    model, rows = hybrid(name), examples(ROWS)
    loss, gradients = own_loss_and_gradients(model, rows)
    for module in (recurrence, mixers):
        monkeypatch.setattr(module, "kernel_packages", lambda model: dict.fromkeys(["mamba_ssm"], True))
    causal_lm = CausalLM.of(model, packing=False).train()
    own = next(each for each in model.modules() if isinstance(each, mixers.CallingMixer))
    assert not isinstance(own, mixers.RowMixer) and model.training
    assert any(linear.endswith(".out_proj") for linear in quantizable_linears(model))

    def fused(*arguments: object, **keywords: object) -> None:
        raise AssertionError("the fused kernel is asked")

    code = sys.modules[mixers.class_of(own).__module__]
    monkeypatch.setattr(code, "mamba2_split_conv1d_scan_combined", fused)
    ours, our_gradients = trained_loss_and_gradients(causal_lm, rows)
    assert ours == pytest.approx(loss, rel=2e-6) and relative(our_gradients, gradients) <= 1e-5
    mixers.restore_mixers(model)
    assert type(own) is mixers.class_of(own) and own.training


def test_where_peft_takes_no_adapter_there_is_none() -> None:
    model = hybrid("mamba2", adapters=False)
    assert not any(name.endswith("out_proj") for name in resolve_targets(model, "all-linear"))
    assert any("2 x out_proj in few bits has no adapter: PEFT takes none" in said for said in describe_untouched(model))
    with pytest.raises(ConfigError, match="names 'out_proj', which has no adapter: PEFT takes none"):
        resolve_targets(model, "out_proj")
    config = LoraConfig(r=2, target_modules=["out_proj"])
    with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
        get_peft_model(model, config)
    assert any(name.endswith("out_proj") for name in resolve_targets(hybrid("bamba", adapters=False), "all-linear"))


def test_an_adapter_of_peft_on_what_steers_a_state_is_read(tmp_path: Path) -> None:
    plain = hybrid("qwen3_5_text", adapters=False)
    config = LoraConfig(r=2, target_modules=["in_proj_a", "in_proj_qkv"], init_lora_weights=False)
    peft = get_peft_model(copy.deepcopy(plain), config).eval()
    peft.save_pretrained(tmp_path)
    adapters = read_adapter(plain, tmp_path)
    assert {name.rpartition(".")[2] for name in adapters} == {"in_proj_a", "in_proj_qkv"}
    ids = torch.arange(5, 25)[None]
    expected = peft(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(plain(input_ids=ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
