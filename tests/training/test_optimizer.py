import pytest
import torch
from torch import nn

from nybble.kernels.ops.optimizer import adamw_, adamw_8bit_
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
