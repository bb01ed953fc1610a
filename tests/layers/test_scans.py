"""Recurrences over packed rows against their own definition, token by token and each row by itself, in fp64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.layers.scans import CHUNK, causal_conv, gated_delta_rule, selective_scan, state_space_scan

LENGTHS = (1, 5, CHUNK - 6, 2 * CHUNK + 3, CHUNK, 7)  # rows that end in, at and beyond the end of a chunk
T = sum(LENGTHS)
ROWS = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def slow_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    padded = F.pad(x.T[None], (weight.shape[1] - 1, 0))
    return F.conv1d(padded, weight[:, None], bias, groups=len(weight))[0].T


def slow_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    state, outputs = torch.zeros(q.shape[1], q.shape[2], v.shape[2], dtype=q.dtype), []
    for t in range(len(q)):
        state = state * log_decay[t].exp()[:, None, None]
        missing = v[t] - torch.einsum("hkv,hk->hv", state, k[t])
        state = state + torch.einsum("hk,hv->hkv", k[t] * beta[t][:, None], missing)
        outputs.append(torch.einsum("hkv,hk->hv", state, q[t]))
    return torch.stack(outputs)


def slow_state_space(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    b, c = (part.repeat_interleave(x.shape[1] // b.shape[1], dim=1) for part in (b, c))
    state, outputs = torch.zeros(x.shape[1], b.shape[2], x.shape[2], dtype=x.dtype), []
    for t in range(len(x)):
        state = state * (dt[t] * a).exp()[:, None, None]
        state = state + torch.einsum("hs,hp->hsp", b[t] * dt[t][:, None], x[t])
        outputs.append(torch.einsum("hsp,hs->hp", state, c[t]))
    return torch.stack(outputs)


def slow_selective(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    state, outputs = torch.zeros_like(a), []
    for t in range(len(x)):
        state = state * (dt[t][:, None] * a).exp() + (dt[t] * x[t])[:, None] * b[t]
        outputs.append(state @ c[t])
    return torch.stack(outputs)


def delta_arguments() -> list[Tensor]:
    q, k = (F.normalize(normal(T, 3, 4, seed=seed), dim=-1).detach().requires_grad_() for seed in (1, 2))
    decay = (-normal(T, 3, seed=4).abs() * torch.tensor([0.05, 1, 50])).detach().requires_grad_()
    beta = normal(T, 3, seed=5).sigmoid().detach().requires_grad_()
    return [q, k, normal(T, 3, 5, seed=3), decay, beta]


def state_space_arguments() -> list[Tensor]:
    dt = normal(T, 4, seed=2).abs().detach().requires_grad_()
    a = torch.tensor([-0.05, -1, -7, -50], dtype=torch.float64, requires_grad=True)
    return [normal(T, 4, 3, seed=1), dt, a, normal(T, 2, 6, seed=4), normal(T, 2, 6, seed=5)]


def selective_arguments() -> list[Tensor]:
    dt = normal(T, 6, seed=2).abs().detach().requires_grad_()
    a = (-normal(6, 3, seed=3).abs() * torch.tensor([0.05, 1, 50])).detach().requires_grad_()
    return [normal(T, 6, seed=1), dt, a, normal(T, 3, seed=4), normal(T, 3, seed=5)]


def conv_arguments() -> list[Tensor]:
    return [normal(T, 6, seed=1), normal(6, 4, seed=2), normal(6, seed=3)]


@pytest.mark.parametrize(
    ("scan", "slow", "arguments"),
    [
        (causal_conv, slow_conv, conv_arguments()),
        (gated_delta_rule, slow_delta_rule, delta_arguments()),
        (state_space_scan, slow_state_space, state_space_arguments()),
        (selective_scan, slow_selective, selective_arguments()),
    ],
    ids=["conv", "delta", "state space", "selective"],
)
def test_each_row_is_as_if_it_were_alone(
    scan: Callable[..., Tensor], slow: Callable[..., Tensor], arguments: list[Tensor]
) -> None:
    weight = normal(T, 1, seed=9).detach()
    ours = scan(*arguments, ROWS)
    by_row = zip(*(x.split(LENGTHS) if len(x) == T else [x] * len(LENGTHS) for x in arguments), strict=True)
    expected = torch.cat([slow(*row) for row in by_row])
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
    weight = weight.view(T, *[1] * (ours.ndim - 1))
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), arguments),
        torch.autograd.grad((expected * weight).sum(), arguments),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-9)


def test_what_a_row_may_not_see_has_a_gradient_of_zero() -> None:
    for scan, arguments in (
        (gated_delta_rule, delta_arguments()),
        (state_space_scan, state_space_arguments()),
        (selective_scan, selective_arguments()),
    ):
        third = ROWS == 2
        gradients = torch.autograd.grad(scan(*arguments, ROWS)[third].square().sum(), arguments[0])[0]
        assert gradients[third].abs().min(0).values.sum() >= 0 and gradients[third].any()
        assert not gradients[~third].any()
