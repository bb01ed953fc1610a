from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from nybble.kernels.ops.optimizer import adamw_, adamw_8bit_
from nybble.layers.convert import attach_adapters, learning_rates, trained_parameters
from nybble.training.optimizer import AdamW, Bits, moments_layout


@pytest.mark.parametrize("max_norm", [0.3, 1e9])
def test_steps_equal_torchs_adamw_with_clipping(max_norm):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(n, 7)) for n in (3, 16, 1)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = AdamW(ours, beta1=0.9, beta2=0.999, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs, betas=(0.9, 0.999), weight_decay=0.1)
    for step in range(1, 6):
        lr = 1e-2 / step
        for mine, other in zip(ours, theirs, strict=True):
            other.grad = torch.randn_like(other)
            mine.grad.copy_(other.grad)
        norm = float(optimizer.gradient_norm())
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(theirs, max_norm)), rel=1e-6)
        versions = [mine._version for mine in ours]
        optimizer.step(lr, grad_scale=min(1.0, max_norm / norm))
        reference.param_groups[0]["lr"] = lr
        reference.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.grad is not None and not mine.grad.any()
            assert mine._version == versions.pop(0) + 1
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [32, 8])
def test_one_call_for_all_parameters_gives_the_bits_of_a_call_for_each(bits: Bits):
    torch.manual_seed(0)
    flat = [nn.Parameter(torch.randn(shape)) for shape in ((3, 300), (1, 1), (16, 16), (700,))]
    alone = [p.detach().clone() for p in flat]
    moments = [
        {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in moments_layout(p.shape, bits).items()}
        for p in alone
    ]
    optimizer = AdamW(flat, beta1=0.9, beta2=0.99, weight_decay=0.1, bits=bits)
    assert (
        len({p.untyped_storage().data_ptr() for p in flat})
        == len({p.grad.untyped_storage().data_ptr() for p in flat})
        == 1
    )
    settings = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 0.5}
    for step in range(1, 6):
        gradients = [torch.randn_like(p) for p in alone]
        for p, gradient in zip(flat, gradients, strict=True):
            p.grad.copy_(gradient)
        norms = [gradient.norm().double() for gradient in gradients]
        assert optimizer.gradient_norm() == float(torch.stack(norms).norm())
        optimizer.step(1e-2, grad_scale=0.5)
        for p, gradient, state in zip(alone, gradients, moments, strict=True):
            (adamw_ if bits == 32 else adamw_8bit_)(p, gradient, **state, step=step, **settings)
    assert all(torch.equal(a, b) for a, b in zip(flat, alone, strict=True))
    kept = dict(optimizer.tensors())
    for i, state in enumerate(moments):
        assert all(torch.equal(kept[f"{i}.{name}"], moment) for name, moment in state.items())
    assert optimizer.layout() == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in kept.items()}
    other = AdamW([nn.Parameter(p.detach().clone()) for p in flat], beta1=0.9, beta2=0.99, weight_decay=0.1, bits=bits)
    other.load_state(kept.__getitem__)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in other.tensors())


def test_a_gradient_that_was_replaced_is_noticed():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = AdamW([parameter], beta1=0.9, beta2=0.99, weight_decay=0.0)
    parameter.sum().backward()
    assert optimizer.gradient_norm() == pytest.approx(3**0.5)
    parameter.grad = torch.ones(3)
    with pytest.raises(AssertionError, match="replaced"):
        optimizer.step(1e-2, grad_scale=1.0)


@pytest.mark.parametrize("paged", [False, True])
def test_lora_plus_takes_pefts_steps(paged: bool, tmp_path: Path) -> None:
    """And every moment keeps the name that it has without it."""
    torch.manual_seed(0)
    theirs = get_peft_model(
        nn.Sequential(*(nn.Linear(9, 9) for _ in range(3))), LoraConfig(r=2, target_modules="[012]")
    )
    ours = nn.Sequential(*(nn.Linear(9, 9) for _ in range(3)))
    attach_adapters(ours, ["0", "1", "2"], rank=2, alpha=8.0)
    pairs = list(zip(trained_parameters(ours), trained_parameters(theirs), strict=True))  # A, B, A, B, ..
    for mine, other in pairs:
        mine.data.copy_(other)
    settings = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "paged_in": tmp_path if paged else None}
    optimizer = AdamW(trained_parameters(ours), rates=learning_rates(ours, 16.0), **settings)
    reference = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, betas=(0.9, 0.99), eps=1e-8
    )
    for _ in range(3):
        for mine, other in pairs:
            other.grad = torch.randn_like(other)
            mine.grad.copy_(other.grad)
        optimizer.step(1e-3, grad_scale=1.0)
        reference.step()
        for mine, other in pairs:
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
    for i, (_, other) in enumerate(pairs):
        moment = {name: tensor.clone() for name, tensor in optimizer.tensors()}[f"{i}.exp_avg"]
        torch.testing.assert_close(moment, reference.state[other]["exp_avg"])
