"""The chunked loss head against cross-entropy over all logits."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nybble.layers.lora import LoraLinear
from nybble.layers.loss_head import LossHead
from nybble.sizes import SHAPE_RULES

pytestmark = pytest.mark.usefixtures("poisoned_slabs")

VOCABULARY, HIDDEN, ROWS = 257, 24, 141


def dense_loss(
    head: LossHead, hidden: torch.Tensor, targets: torch.Tensor, denominator: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    logits = hidden @ head.weight.to(hidden.dtype).T
    if head.bias is not None:
        logits = logits + head.bias.to(hidden.dtype)
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses if weights is None else losses * weights).sum() / denominator


@pytest.mark.parametrize("chunk_rows", [64, 128])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "extras", [{}, {"scale": 0.25}, {"softcap": 3.0}, {"scale": 2.0, "softcap": 5.0, "bias": torch.randn(VOCABULARY)}]
)
def test_loss_and_gradient_equal_the_dense_ones(monkeypatch, chunk_rows, weight_dtype, extras):
    cut = replace(SHAPE_RULES["cpu"], chunk_bytes=chunk_rows * VOCABULARY * 8, panel_rows=100)
    monkeypatch.setitem(SHAPE_RULES, "cpu", cut)
    torch.manual_seed(0)
    head = LossHead(torch.randn(VOCABULARY, HIDDEN).to(weight_dtype), **extras)
    hidden = torch.randn(ROWS, HIDDEN, requires_grad=True)
    targets = torch.randint(VOCABULARY, (ROWS,))
    loss = head.loss(hidden, targets, 77.0)
    (3 * loss).backward()
    reference = hidden.detach().double().requires_grad_()
    expected = dense_loss(head, reference, targets, 77.0)
    (3 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert (hidden.grad - reference.grad).norm() <= 1e-5 * reference.grad.norm()
    per_token = head.token_losses(hidden, targets)
    torch.testing.assert_close(per_token.double().sum() / 77.0, expected.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("extras", [{}, {"scale": 2.0, "softcap": 5.0, "bias": torch.randn(VOCABULARY)}])
def test_weighted_losses_equal_the_dense_ones(monkeypatch, extras):
    monkeypatch.setitem(SHAPE_RULES, "cpu", replace(SHAPE_RULES["cpu"], chunk_bytes=64 * VOCABULARY * 8))
    torch.manual_seed(3)
    head = LossHead(torch.randn(VOCABULARY, HIDDEN), **extras)
    hidden = torch.randn(ROWS, HIDDEN, requires_grad=True)
    targets, weights = torch.randint(VOCABULARY, (ROWS,)), torch.randn(ROWS)
    loss = head.loss(hidden, targets, 7.0, weights)
    loss.backward()
    reference = hidden.detach().double().requires_grad_()
    expected = dense_loss(head, reference, targets, 7.0, weights.double())
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert (hidden.grad - reference.grad).norm() <= 1e-5 * reference.grad.norm()
    torch.testing.assert_close(head.token_losses(hidden, targets, weights).sum() / 7.0, loss, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(head.loss(hidden, targets, 7.0, weights), loss, rtol=1e-5, atol=1e-6)


def test_weighted_losses_train_an_adapter_on_the_head(monkeypatch):
    """Its A and B, against autograd over all logits at once."""
    monkeypatch.setitem(SHAPE_RULES, "cpu", replace(SHAPE_RULES["cpu"], chunk_bytes=64 * VOCABULARY * 8))
    torch.manual_seed(4)
    linear = nn.Linear(HIDDEN, VOCABULARY, bias=False).requires_grad_(False)
    adapter = LoraLinear(linear, rank=3, alpha=6.0)
    nn.init.normal_(adapter.lora_B)
    hidden = torch.randn(ROWS, HIDDEN, requires_grad=True)
    targets, weights = torch.randint(VOCABULARY, (ROWS,)), torch.rand(ROWS)
    trained = (hidden, adapter.lora_A, adapter.lora_B)
    losses = F.cross_entropy(adapter(hidden), targets, reduction="none")
    expected = torch.autograd.grad((losses * weights).sum() / 7.0, trained)
    ours = torch.autograd.grad(LossHead(linear.weight, adapter=adapter).loss(hidden, targets, 7.0, weights), trained)
    for got, own in zip(ours, expected, strict=True):
        assert (got - own).norm() <= 1e-5 * own.norm()


def test_bf16_gradients_are_no_worse_than_autograds_own_bf16():
    torch.manual_seed(1)
    weight = torch.randn(VOCABULARY, HIDDEN) * 0.2
    hidden = torch.randn(ROWS, HIDDEN)
    targets = torch.randint(VOCABULARY, (ROWS,))
    exact = hidden.double().requires_grad_()
    dense_loss(LossHead(weight.bfloat16().double()), exact, targets, ROWS).backward()

    def error(hidden_bf16: torch.Tensor) -> float:
        return float((hidden_bf16.grad.double() - exact.grad).norm())

    ours = hidden.bfloat16().requires_grad_()
    LossHead(weight.bfloat16()).loss(ours, targets, ROWS).backward()
    autograd = hidden.bfloat16().requires_grad_()
    F.cross_entropy((autograd @ weight.bfloat16().T).float(), targets).backward()
    assert error(ours) <= 1.1 * error(autograd)


def test_how_a_step_is_cut_into_micro_batches_changes_nothing():
    torch.manual_seed(2)
    head = LossHead(torch.randn(VOCABULARY, HIDDEN))
    hidden, targets = torch.randn(ROWS, HIDDEN), torch.randint(VOCABULARY, (ROWS,))
    whole = hidden.clone().requires_grad_()
    head.loss(whole, targets, ROWS).backward()
    cut = hidden.clone().requires_grad_()
    for part in (slice(0, 3), slice(3, 70), slice(70, ROWS)):
        head.loss(cut[part], targets[part], ROWS).backward()
    assert (cut.grad - whole.grad).norm() <= 1e-6 * whole.grad.norm()


def test_no_supervised_rows_give_zero():
    head = LossHead(torch.randn(VOCABULARY, HIDDEN))
    hidden = torch.randn(0, HIDDEN, requires_grad=True)
    loss = head.loss(hidden, torch.zeros(0, dtype=torch.long), 5.0)
    loss.backward()
    assert loss.item() == 0.0 and hidden.grad.shape == (0, HIDDEN)


@pytest.mark.parametrize(
    ("row_bytes", "rows"), [(2 * 49152, 320), (2 * 151936, 128), (4 * 151936, 64), (8 * 256000, 64), (1 << 40, 64)]
)
def test_few_rows_of_logits_are_made_more_where_they_then_take_twice_as_much_at_most(row_bytes, rows):
    assert SHAPE_RULES["cpu"].product_rows(row_bytes) == rows
