"""H and the drift of inputs, against their definitions in fp64."""

import torch

from nybble.calibration.statistics import PANEL, InputStatistics


def test_the_gram_is_that_of_all_rows_whatever_the_panels() -> None:
    generator = torch.Generator().manual_seed(0)
    for width in (1, 5, PANEL, PANEL + 1, 2 * PANEL + 7):
        x, exact = torch.randn(2, 40, width, generator=generator).to(torch.bfloat16)
        weight = torch.randn(9, width, generator=generator).to(torch.bfloat16)
        statistics = InputStatistics(width)
        for rows in (slice(0, 13), slice(13, 40)):
            statistics.add(x[rows])
            statistics.add_drift("it", weight, x[rows], exact[rows])
        wide = x.double()
        hessian = statistics.finish()
        torch.testing.assert_close(hessian.double(), wide.T @ wide / 40, rtol=1e-5, atol=1e-5)
        assert torch.equal(hessian, hessian.T)
        drift = wide.T @ (exact.double() - wide) @ weight.double().T / 40
        assert (statistics.drifts["it"].double() - drift).norm() < 1e-2 * drift.norm()  # products in bf16
        assert statistics.rows == 40


def test_a_drift_is_that_of_the_rows_that_have_it() -> None:
    statistics = InputStatistics(3)
    x, exact = torch.ones(4, 3), torch.full((4, 3), 1.5)
    statistics.add(torch.full((5, 3), 2.0))
    statistics.add(x)
    statistics.add_drift("all", torch.ones(2, 3), x, exact)
    statistics.add_drift("some", torch.eye(3), x[:2], exact[:2])
    assert torch.equal(statistics.finish(), torch.full((3, 3), 24 / 9))
    assert torch.equal(statistics.drifts["all"], torch.full((3, 2), 1.5))
    assert torch.equal(statistics.drifts["some"], torch.full((3, 3), 0.5))


def test_without_exact_inputs_there_is_no_drift() -> None:
    statistics = InputStatistics(4)
    statistics.add(torch.ones(3, 4))
    statistics.finish()
    assert statistics.drifts == {}
