"""H and the factor of its inverse in one matrix, against plain algebra in fp64."""

import pytest
import torch
from torch import Tensor

from nybble.calibration.hessian import PANEL, Hessian

WIDTHS = (1, 70, PANEL, PANEL + 1, 2 * PANEL + 37)


def positive(width: int) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(2 * width + 3, width, generator=generator) * torch.rand(width, generator=generator)
    return x.T @ x / len(x)


def case(width: int, damping: float = 0.01) -> tuple[Hessian, Tensor]:
    """A factorised one, and what it is of, undamped, in fp64."""
    matrix = positive(width)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(width))
    expected = matrix[order][:, order].double()
    hessian = Hessian(matrix.clone(), order)
    assert hessian.factorise(damping)
    return hessian, expected


@pytest.mark.parametrize("width", WIDTHS)
def test_the_factor_is_that_of_the_damped_inverse(width: int) -> None:
    hessian, expected = case(width)
    u = hessian.factor(slice(0, width), slice(0, width)).double().triu()
    damped = expected + 0.01 * torch.eye(width)
    torch.testing.assert_close(u.T @ u @ damped, torch.eye(width).double(), rtol=1e-3, atol=1e-3)
    assert torch.equal(hessian.pivots.double(), u.diagonal())


@pytest.mark.parametrize("width", WIDTHS)
@torch.no_grad()
def test_products_are_those_of_h_before_and_after_it_is_factorised(width: int) -> None:
    x = torch.randn(width, 5, generator=torch.Generator().manual_seed(1))
    hessian, expected = case(width)
    plain = Hessian(positive(width))
    for each, matrix in ((plain, positive(width).double()), (hessian, expected)):
        torch.testing.assert_close(each.times(x).double(), matrix @ x.double(), rtol=1e-4, atol=1e-4)
        assert torch.equal(each.times(torch.eye(width)).double(), matrix)
    damped = expected + 0.01 * torch.eye(width)
    torch.testing.assert_close(damped @ hessian.divide(x).double(), x.double(), rtol=1e-3, atol=1e-3)


def test_an_attempt_that_fails_leaves_h_whole() -> None:
    width = PANEL + 30
    matrix = positive(width)
    matrix[3, 3] = -1.0  # found in the last panel that is tried, the first one
    hessian = Hessian(matrix.clone())
    assert not hessian.factorise(0.01)
    assert torch.equal(hessian.times(torch.eye(width)), matrix)
    assert hessian.factorise(10.0)
    assert torch.equal(hessian.times(torch.eye(width)), matrix)
    u = hessian.factor(slice(0, width), slice(0, width)).double().triu()
    damped = matrix.double() + 10 * torch.eye(width)
    torch.testing.assert_close(u.T @ u @ damped, torch.eye(width).double(), rtol=1e-3, atol=1e-3)
