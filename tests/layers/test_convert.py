"""Swapping modules in real transformers models, and what PEFT reads of it."""

import json

import pytest
import torch
from tiny import put_into_four_bits
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from nybble.errors import ConfigError, RunError
from nybble.formats.quant_spec import QuantSpec
from nybble.layers.backbone import decoder_states
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import (
    adapters_of,
    attach_adapters,
    enable_adapters,
    quantizable_linears,
    resolve_targets,
)
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.runs.adapter_files import read_adapter
from nybble.runs.adapter_writing import adapter_config, write_adapter

LLAMA = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
QWEN2 = Qwen2Config(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
GPT2 = GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)
CONFIGS = {"llama": LLAMA, "qwen2": QWEN2, "gpt2": GPT2}


def dense_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32).eval()


def dequantized_twin(model: nn.Module, family: str) -> nn.Module:
    """A plain transformers model whose dense weights are what the four-bit model computes with."""
    twin = dense_model(family)
    with torch.no_grad():
        for name in quantizable_linears(twin):
            weight = model.get_submodule(name).dequantize()
            target = twin.get_submodule(name)
            target.weight.copy_(weight.T if type(target).__name__ == "Conv1D" else weight)
    return twin


@pytest.mark.parametrize("family", CONFIGS)
def test_every_linear_of_the_blocks_and_nothing_else(family):
    model = dense_model(family)
    names = quantizable_linears(model)
    per_block = 4 if family == "gpt2" else 7
    assert len(names) == 2 * per_block
    assert not any("lm_head" in name or "embed" in name or "wte" in name for name in names)


@pytest.mark.parametrize("family", CONFIGS)
def test_four_bit_model_equals_the_dense_model_of_its_dequantised_weights(family):
    model = dense_model(family)
    put_into_four_bits(model, QuantSpec())
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == len(quantizable_linears(model))
    ids = torch.randint(96, (2, 9))
    torch.testing.assert_close(
        model(input_ids=ids).logits, dequantized_twin(model, family)(input_ids=ids).logits, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("targets", ["all-linear", "attention"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_our_adapter_and_gives_the_same_logits(family, targets, rslora, tmp_path):
    from peft import PeftModel

    model = dense_model(family)
    put_into_four_bits(model, QuantSpec())
    twin = dequantized_twin(model, family)
    adapters = attach_adapters(model, resolve_targets(model, targets), rank=3, alpha=6.0, rslora=rslora, seed=5)
    for adapter in adapters.values():
        nn.init.normal_(adapter.lora_B, std=0.3)
    ids = torch.randint(96, (2, 9))
    base_logits = twin(input_ids=ids).logits
    write_adapter(model, tmp_path, adapter_config(model, "base"))
    peft_logits = PeftModel.from_pretrained(twin, tmp_path).eval()(input_ids=ids).logits
    ours = model(input_ids=ids).logits
    assert (ours - base_logits).norm() > 1e-2 * base_logits.norm(), "the adapter must change something"
    torch.testing.assert_close(ours, peft_logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_read_back_exactly(tmp_path):
    model = dense_model("llama")
    attach_adapters(model, resolve_targets(model, "q_proj,down_proj"), rank=2, alpha=5.0, dropout=0.1, seed=1)
    for adapter in adapters_of(model).values():
        nn.init.normal_(adapter.lora_B)
    write_adapter(model, tmp_path, adapter_config(model, "base"))
    other = dense_model("llama")
    adapters = read_adapter(other, tmp_path)
    assert adapters.keys() == adapters_of(model).keys()
    ids = torch.randint(96, (1, 7))
    assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)
    enable_adapters(other, False)
    assert torch.equal(other(input_ids=ids).logits, dense_model("llama")(input_ids=ids).logits)


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    model = dense_model("llama")
    attach_adapters(model, resolve_targets(model, "all-linear"), rank=2, alpha=5.0)
    write_adapter(model, tmp_path, adapter_config(model, "base"))
    with pytest.raises(RunError, match=r"model\.layers.*which this base does not have"):
        read_adapter(dense_model("gpt2"), tmp_path)
    with pytest.raises(RunError, match="should have shape"):
        read_adapter(dense_model("qwen2"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["r"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="damaged"):
        read_adapter(dense_model("llama"), tmp_path)


def test_target_names_resolve_and_unknown_ones_name_the_nearest():
    model = dense_model("llama")
    assert len(resolve_targets(model, "attention")) == 8
    assert resolve_targets(model, ["mlp.up_proj"]) == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    with pytest.raises(ConfigError, match=r"(?s)qproj.*Did you mean 'q_proj'"):
        resolve_targets(model, "qproj")


def test_the_same_seed_draws_the_same_adapter():
    first, second = dense_model("llama"), dense_model("llama")
    for model in (first, second):
        attach_adapters(model, resolve_targets(model, "all-linear"), rank=2, alpha=5.0, seed=7)
    for a, b in zip(adapters_of(first).values(), adapters_of(second).values(), strict=True):
        assert torch.equal(a.lora_A, b.lora_A) and not b.lora_B.any()


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_documents_give_the_states_that_each_gives_alone(family):
    model = dense_model(family)
    documents = [torch.randint(96, (1, n)) for n in (5, 1, 9)]
    alone = torch.cat([decoder_states(model, ids, torch.arange(ids.shape[1])[None]) for ids in documents], dim=1)
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in documents])[None]
    packed = decoder_states(model, torch.cat(documents, dim=1), positions)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    assert CausalLM.of(model).verdict.layout == "packed"


def test_a_model_that_mixes_packed_documents_is_noticed():
    model = dense_model("gpt2")
    original = model.transformer.forward

    def forget_positions(input_ids, position_ids=None, **kwargs):  # a model that numbers every row from 0
        return original(input_ids=input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **kwargs)

    model.transformer.forward = forget_positions
    assert CausalLM.of(model).verdict.layout == "padded"
