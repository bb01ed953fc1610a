import pytest
import torch
from torch import nn

from nybble.training.optimizer import AdamW


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
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
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
