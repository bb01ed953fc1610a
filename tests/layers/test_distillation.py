"""Distillation through the chunked head, against KL and cross-entropy over all logits by autograd."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nybble.layers.distillation import Distilled, Mixture, TeacherRows, likeliest
from nybble.layers.lora import LoraLinear
from nybble.layers.loss_head import Head, LossHead
from nybble.layers.own_head import OwnHead
from nybble.layers.token_rows import TokenLogits
from nybble.sizes import SHAPE_RULES

VOCABULARY, HIDDEN, ROWS = 157, 24, 141
MIXTURE = Mixture(alpha=0.3, temperature=1.7)


def plainly(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor, mixture: Mixture, top_k: int
) -> tuple[Tensor, list[Tensor]]:
    """Loss of each row, and its KL, cross-entropy and agreement, as the textbook writes them, over k + 1 outcomes."""
    p = (teacher_logits / mixture.temperature).softmax(dim=1)
    q = (logits / mixture.temperature).softmax(dim=1)
    chosen = torch.zeros_like(p, dtype=torch.bool).scatter(1, p.topk(top_k, dim=1).indices, True)
    kl = (p * (p.log() - q.log())).masked_fill(~chosen, 0.0).sum(dim=1)
    if top_k < p.shape[1]:
        rest_p, rest_q = (each.masked_fill(chosen, 0.0).sum(dim=1) for each in (p, q))
        kl = kl + rest_p * (rest_p.log() - rest_q.log())
    cross_entropy = F.cross_entropy(logits, targets, reduction="none")
    loss = mixture.alpha * mixture.temperature**2 * kl + (1 - mixture.alpha) * cross_entropy
    return loss, [kl, cross_entropy, (logits.argmax(1) == teacher_logits.argmax(1)).to(logits.dtype)]


def small(chunk_rows: int) -> Any:
    return replace(SHAPE_RULES["cpu"], chunk_bytes=chunk_rows * VOCABULARY * 8, row_multiple=chunk_rows, panel_rows=50)


def teacher_of(logits: Tensor, top_k: int, mixture: Mixture) -> TeacherRows:
    """Through a head whose states are the logits themselves."""
    found = likeliest(LossHead(torch.eye(VOCABULARY)), logits, top_k, VOCABULARY, mixture.temperature)
    assert bool((found.log_p.exp().sum(dim=1) - 1).abs().max() < 1e-5)
    return found


@pytest.mark.parametrize("extras", [{}, {"softcap": 3.0}, {"scale": 2.0, "softcap": 5.0, "bias": "random"}])
@pytest.mark.parametrize(("chunk_rows", "top_k"), [(1, 5), (64, VOCABULARY), (64, 1)])
@pytest.mark.parametrize("mixture", [MIXTURE, Mixture(1.0, 1.0)])
def test_loss_and_gradient_equal_those_over_all_logits(monkeypatch, extras, chunk_rows, top_k, mixture):
    monkeypatch.setitem(SHAPE_RULES, "cpu", small(chunk_rows))
    torch.manual_seed(0)
    extras = {name: torch.randn(VOCABULARY) if value == "random" else value for name, value in extras.items()}
    head, teacher_logits = LossHead(torch.randn(VOCABULARY, HIDDEN), **extras), 3 * torch.randn(ROWS, VOCABULARY)
    hidden = torch.randn(ROWS, HIDDEN, requires_grad=True)
    targets, weights = torch.randint(VOCABULARY, (ROWS,)), torch.rand(ROWS)
    criterion = Distilled(teacher_of(teacher_logits, top_k, mixture), mixture)
    loss, figures = head.judge(criterion, hidden, targets, 77.0, weights)
    (3 * loss).backward()

    exact = hidden.detach().double().requires_grad_()
    logits = (exact @ head.weight.double().T + (0 if head.bias is None else head.bias.double())) * head.scale
    logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    losses, told = plainly(logits, teacher_logits.double(), targets, mixture, top_k)
    expected = (losses * weights).sum() / 77.0
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (hidden.grad - exact.grad).norm() <= 1e-5 * exact.grad.norm()
    torch.testing.assert_close(figures.double(), torch.stack(told).detach(), rtol=1e-4, atol=1e-5)
    assert not figures.requires_grad
    evaluated = head.figures(criterion, hidden, targets)
    torch.testing.assert_close(evaluated.double(), torch.stack([losses, *told]).detach(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert head.judge(criterion, hidden, targets, 77.0, weights)[0].item() == pytest.approx(loss.item(), rel=1e-5)


def adapted_head() -> tuple[Head, Callable[[Tensor], Tensor], list[Tensor]]:
    linear = nn.Linear(HIDDEN, VOCABULARY, bias=False).requires_grad_(False)
    adapter = LoraLinear(linear, rank=3, alpha=6.0)
    nn.init.normal_(adapter.lora_B)
    return LossHead(linear.weight, adapter=adapter), adapter, [adapter.lora_A, adapter.lora_B]


def token_rows_head() -> tuple[Head, Callable[[Tensor], Tensor], list[Tensor]]:
    linear = nn.Linear(HIDDEN, VOCABULARY, bias=False).requires_grad_(False)
    logits = TokenLogits(linear, [3, 77])
    return LossHead(linear.weight, adapter=logits), logits, [p for p in logits.parameters() if p.requires_grad]


def trained_head() -> tuple[Head, Callable[[Tensor], Tensor], list[Tensor]]:
    weight = torch.randn(VOCABULARY, HIDDEN, requires_grad=True)
    return LossHead(weight), lambda hidden: hidden @ weight.T, [weight]


def own_head() -> tuple[Head, Callable[[Tensor], Tensor], list[Tensor]]:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).requires_grad_(False)
    weight = model.lm_head.weight.requires_grad_()
    return OwnHead(model), lambda hidden: hidden @ weight.T, [weight]


@pytest.mark.parametrize("make", [adapted_head, trained_head, own_head])
@pytest.mark.parametrize("top_k", [6, VOCABULARY])
def test_heads_that_are_trained_get_their_gradients(monkeypatch, make, top_k):
    monkeypatch.setitem(SHAPE_RULES, "cpu", small(64))
    torch.manual_seed(1)
    head, project, trained = make()
    hidden, teacher_logits = torch.randn(ROWS, HIDDEN, requires_grad=True), 2 * torch.randn(ROWS, VOCABULARY)
    targets, weights = torch.randint(VOCABULARY, (ROWS,)), torch.rand(ROWS)
    losses, told = plainly(project(hidden), teacher_logits, targets, MIXTURE, top_k)
    expected = torch.autograd.grad((losses * weights).sum() / 9.0, [hidden, *trained])
    criterion = Distilled(teacher_of(teacher_logits, top_k, MIXTURE), MIXTURE)
    loss, figures = head.judge(criterion, hidden, targets, 9.0, weights)
    for ours, theirs in zip(torch.autograd.grad(loss, [hidden, *trained]), expected, strict=True):
        assert (ours - theirs).norm() <= 2e-5 * theirs.norm() and theirs.norm() > 0
    torch.testing.assert_close(figures, torch.stack(told).detach(), rtol=1e-4, atol=1e-5)
    assert not figures.requires_grad


def test_bf16_gradients_are_no_worse_than_autograds_own_bf16():
    torch.manual_seed(1)
    weight, hidden = torch.randn(VOCABULARY, HIDDEN) * 0.5, torch.randn(ROWS, HIDDEN)
    teacher_logits, targets = 2 * torch.randn(ROWS, VOCABULARY), torch.randint(VOCABULARY, (ROWS,))
    rounded = weight.bfloat16()

    def error(states: Tensor, loss: Callable[[Tensor], Tensor]) -> float:
        states = states.requires_grad_()
        loss(states).backward()
        return float((states.grad.double() - exact.grad).norm())

    exact = hidden.bfloat16().double().requires_grad_()
    plainly(exact @ rounded.double().T, teacher_logits.double(), targets, MIXTURE, 9)[0].mean().backward()
    criterion = Distilled(teacher_of(teacher_logits, 9, MIXTURE), MIXTURE)
    ours = error(hidden.bfloat16(), lambda h: LossHead(rounded).judge(criterion, h, targets, ROWS)[0])
    theirs = error(
        hidden.bfloat16(),
        lambda h: plainly((h @ rounded.T).float(), teacher_logits, targets, MIXTURE, 9)[0].mean(),
    )
    assert ours <= 1.2 * theirs


def test_no_rows_give_zero():
    criterion = Distilled(TeacherRows(torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, 5)), MIXTURE)
    hidden = torch.randn(0, HIDDEN, requires_grad=True)
    loss, figures = LossHead(torch.randn(VOCABULARY, HIDDEN)).judge(criterion, hidden, torch.zeros(0).long(), 5.0)
    loss.backward()
    assert loss.item() == 0.0 and figures.shape == (3, 0)


def test_a_teacher_that_knows_more_tokens_is_asked_for_the_students():
    """As if its logits ended where the student's do."""
    torch.manual_seed(2)
    logits = torch.randn(7, VOCABULARY)
    logits[:, 100:] += 9
    head = LossHead(torch.eye(VOCABULARY))
    ids, log_p = likeliest(head, logits, 100, 100, 2.0)
    assert int(ids.max()) < 100 and bool(log_p[:, -1].isneginf().all())
    expected = (logits[:, :100] / 2).log_softmax(dim=1)
    torch.testing.assert_close(torch.zeros(7, 100).scatter(1, ids, log_p[:, :-1]), expected)
