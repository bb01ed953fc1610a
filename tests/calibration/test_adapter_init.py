"""The nearest product of low rank, by definition and against the decomposition written out."""

import pytest
import torch

from nybble.calibration.adapter_init import DAMPING, nearest_product


def example(out: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(out)
    error = torch.randn(out, in_features, generator=generator)
    x = torch.randn(400, in_features, generator=generator) * torch.logspace(0, -2, in_features)
    return error, x.T @ x / len(x)


@pytest.mark.parametrize(("out", "in_features"), [(48, 96), (96, 48), (33, 33)])
@pytest.mark.parametrize("scaling", [2.0, 0.5])
def test_without_inputs_it_is_the_truncated_decomposition(out: int, in_features: int, scaling: float) -> None:
    error, _ = example(out, in_features)
    a, b = nearest_product(error, 5, scaling)
    u, s, v = torch.linalg.svd(error.double(), full_matrices=False)
    expected = u[:, :5] * s[:5] @ v[:5]
    assert (scaling * (b @ a) - expected).norm() < 1e-5 * expected.norm()
    assert b.norm() == pytest.approx(float(a.norm()), rel=1e-4)


@pytest.mark.parametrize(("out", "in_features"), [(48, 96), (96, 48)])
def test_with_inputs_it_loses_least_of_the_output(out: int, in_features: int) -> None:
    """As QERA writes it, with the square root of H, and no small change of it is better."""
    error, hessian = example(out, in_features)
    a, b = nearest_product(error, 5, 2.0, hessian)
    damped = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(in_features)
    values, vectors = torch.linalg.eigh(damped)
    root = vectors * values.sqrt() @ vectors.T
    u, s, v = torch.linalg.svd(error.double() @ root, full_matrices=False)
    expected = u[:, :5] * s[:5] @ v[:5] @ torch.linalg.inv(root)
    assert (2.0 * (b @ a) - expected).norm() < 1e-4 * expected.norm()

    def lost(a: torch.Tensor, b: torch.Tensor) -> float:
        left = error.double() - 2.0 * b.double() @ a.double()
        return float(((left @ damped) * left).sum())

    least = lost(a, b)
    assert least < lost(*nearest_product(error, 5, 2.0)) < lost(0 * a, b)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step = (1e-3 * torch.randn(part.shape, generator=generator) for part in (a, b))
        assert lost(a + next(step), b + next(step)) > least * (1 - 1e-6)


def test_a_rank_above_the_matrix_repairs_it_whole_and_pads_with_zeros() -> None:
    error, hessian = example(7, 12)
    for a, b in (nearest_product(error, 16, 1.5), nearest_product(error, 16, 1.5, hessian)):
        assert a.shape == (16, 12) and b.shape == (7, 16)
        assert (1.5 * (b @ a) - error).norm() < 1e-4 * error.norm()
        assert not a[7:].any() and not b[:, 7:].any()


def test_inputs_that_are_all_zero_or_of_few_directions_do_no_harm() -> None:
    error, _ = example(20, 30)
    x = torch.randn(3, 30)
    for hessian in (torch.zeros(30, 30), x.T @ x):
        a, b = nearest_product(error, 4, 1.0, hessian)
        assert a.isfinite().all() and b.isfinite().all()
