"""`CausalLM`: what a loop of one's own is written with."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from nybble.data.examples import EncodedExample
from nybble.data.packing import collate, pack, pack_tokens, pad
from nybble.errors import ModelError
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import adapters_of, attach_adapters, resolve_targets
from nybble.sizes import rules_for

ROWS = [EncodedExample(torch.arange(3, 3 + n, dtype=torch.int32), torch.arange(n) >= 2, f"rows:{n}") for n in (5, 9)]


def adapted(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    for adapter in attach_adapters(model, resolve_targets(model, "all-linear"), rank=2, alpha=4.0).values():
        nn.init.normal_(adapter.lora_B, std=0.1)
    return model


def llama() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return adapted(LlamaForCausalLM(LlamaConfig(vocab_size=96, initializer_range=0.2, **shape)))


def bloom() -> nn.Module:
    """It takes no positions: packed rows would see each other."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    return adapted(BloomForCausalLM(BloomConfig(vocab_size=96, bos_token_id=None, **shape)))


@pytest.mark.parametrize(("make", "few_widths"), [(llama, False), (bloom, False), (bloom, True)])
def test_loss_token_losses_logits_and_states_belong_together(make, few_widths) -> None:
    module = make()
    model, whole = CausalLM.of(module), [row.input_ids.long()[None] for row in ROWS]
    assert model.packed == (make is llama) and model.device == torch.device("cpu")
    batch = collate(ROWS, model.packed)
    if few_widths:
        model.backbone.rules = rules_for("cpu", 2)
        assert model.backbone.rules.padded_width(batch.input_ids.shape[1]) > batch.input_ids.shape[1]
    with torch.no_grad():
        own = torch.cat([module(input_ids=ids).logits[0, 1:-1] for ids in whole])
    targets = torch.cat([ids[0, 2:] for ids in whole])
    losses = F.cross_entropy(own, targets, reduction="none")
    torch.testing.assert_close(model.logits(batch), own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.head.logits(model.hidden(batch).detach()), own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.token_losses(batch), losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.loss(batch), losses.mean(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.loss(batch, 5), losses.sum() / 5, rtol=1e-4, atol=1e-4)
    weights = torch.rand(batch.targets.shape)
    weighted = replace(batch, weights=weights)
    expected = losses * weights.flatten()[batch.supervised_positions]
    torch.testing.assert_close(model.token_losses(weighted), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.loss(weighted), expected.mean(), rtol=1e-4, atol=1e-4)
    assert model.loss(pack_tokens([[5, 6, 7]])) == 0.0  # and not 0 / 0


def test_what_is_trained_is_the_adapters_and_dropout_is_switched_as_in_a_module() -> None:
    module = llama()
    model = CausalLM.of(module)
    trained = [parameter for each in adapters_of(module).values() for parameter in (each.lora_A, each.lora_B)]
    assert {id(p) for p in model.parameters()} == {id(p) for p in trained}
    assert model.train() is model and module.training and model.training
    assert model.eval() is model and not module.training and not model.training


@pytest.mark.parametrize("make", [llama, bloom])
def test_a_target_outside_the_vocabulary_is_refused_before_anything_is_computed(make) -> None:
    """Kernels on a GPU do not look."""
    model = CausalLM.of(make())
    batch = collate(ROWS, model.packed)
    beyond = replace(batch, targets=batch.targets.clone().index_fill_(1, torch.tensor([3]), 96)).to("cpu")
    for take in (model.loss, model.token_losses):
        with pytest.raises(ModelError, match=r"(?s)A target is 96.*ends at 95"):
            take(beyond)


def test_a_batch_of_another_layout_is_refused() -> None:
    """Packed rows would be mixed by the one, and decoder blocks do not know padding."""
    with pytest.raises(ModelError, match=r"(?s)padded batch of 2 documents.*takes packed ones"):
        CausalLM.of(llama()).loss(pad(ROWS))
    model = CausalLM.of(bloom())
    with pytest.raises(ModelError, match=r"(?s)packed batch of 2 documents.*takes padded ones"):
        model.token_losses(pack(ROWS))
    torch.testing.assert_close(model.loss(pack(ROWS[:1])), model.loss(pad(ROWS[:1])))  # one alone is as it is
