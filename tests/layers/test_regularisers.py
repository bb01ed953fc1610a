"""What a training step adds to the plain loss, compared with autograd on PyTorch's own functions."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from nybble.layers.loss_head import LossHead
from nybble.layers.own_head import OwnHead
from nybble.layers.regularisers import Regularisers

BOTH = Regularisers(label_smoothing=0.1, z_loss=0.02)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("regularisers", [BOTH, replace(BOTH, z_loss=0.0), replace(BOTH, label_smoothing=0.0)])
def test_loss_and_gradient_of_the_head(regularisers: Regularisers, softcap: float | None) -> None:
    torch.manual_seed(0)
    weight, hidden, weights = torch.randn(37, 8), torch.randn(11, 8), torch.rand(11)
    targets = torch.randint(37, (11,))
    head = LossHead(weight, scale=0.7, softcap=softcap).with_regularisers(regularisers)
    ours, theirs = (hidden.clone().requires_grad_() for _ in range(2))
    loss = head.loss(ours, targets, 11, weights)
    logits = theirs @ weight.T * 0.7
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, targets, reduction="none", label_smoothing=regularisers.label_smoothing)
    expected = ((expected + regularisers.z_loss * logits.logsumexp(1).square()) * weights).sum() / 11
    for each in (loss, expected):
        each.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    plain = LossHead(weight, scale=0.7, softcap=softcap).token_losses(hidden, targets)
    assert torch.equal(head.token_losses(hidden, targets), plain), "an evaluation is regularised"


def test_rows_without_a_target_stay_out() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 9), torch.tensor([3, -1, 0, -1])
    gradient, losses = torch.zeros(4, 9), torch.zeros(4)
    BOTH.add_(losses, gradient, targets, BOTH.read(logits, targets), 0.5)
    assert not losses[[1, 3]].any() and not gradient[[1, 3]].any() and gradient[[0, 2]].any()


def test_the_models_own_head_has_the_same() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).requires_grad_(False)
    ours, theirs = (torch.ones(5, 32).cumsum(0).sin().requires_grad_() for _ in range(2))
    targets, linear = torch.tensor([4, 7, 49, 0, 4]), LossHead(model.lm_head.weight)
    losses = [OwnHead(model, BOTH).loss(ours, targets, 5), linear.with_regularisers(BOTH).loss(theirs, targets, 5)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_noise_is_as_large_as_neftunes() -> None:
    torch.manual_seed(0)
    noise, lengths = Regularisers(noise=5.0), (400, 100)
    flat = noise.noised(torch.zeros(512, 64), lengths)
    rows = noise.noised(torch.zeros(2, 400, 64), lengths)
    for found, length in ((flat[:400], 400), (flat[400:500], 100), (rows[0], 400), (rows[1], 100)):
        bound = 5.0 / (length * 64) ** 0.5
        assert 0.99 * bound < float(found.abs().max()) <= bound
        assert float(found.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not flat[500:].any()
