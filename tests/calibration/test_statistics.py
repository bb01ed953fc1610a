"""H and the drift of inputs, against their definitions in fp64."""

import torch

from nybble.calibration.statistics import PANEL, InputStatistics


def test_the_gram_is_that_of_all_rows_whatever_the_panels() -> None:
    generator = torch.Generator().manual_seed(0)
    for width in (1, 5, PANEL, PANEL + 1, 2 * PANEL + 7):
        x, exact = torch.randn(2, 40, width, generator=generator).to(torch.bfloat16)
        statistics = InputStatistics(width)
        statistics.add(x[:13], exact[:13])
        statistics.add(x[13:], exact[13:])
        wide = x.double()
        hessian, shift = statistics.finish()
        torch.testing.assert_close(hessian.double(), wide.T @ wide / 40, rtol=1e-5, atol=1e-5)
        assert torch.equal(hessian, hessian.T)
        drift = (exact.double() - wide).T @ wide / 40
        assert (shift.double() - drift).norm() < 1e-2 * drift.norm()  # products in bf16
        assert statistics.rows == 40


def test_the_drift_is_that_of_the_rows_that_have_it() -> None:
    statistics = InputStatistics(3)
    statistics.add(torch.full((5, 3), 2.0))
    statistics.add(torch.ones(4, 3), torch.full((4, 3), 1.5))
    hessian, shift = statistics.finish()
    assert torch.equal(shift, torch.full((3, 3), 0.5))
    assert torch.equal(hessian, torch.full((3, 3), 24 / 9))


def test_without_exact_inputs_there_is_no_drift() -> None:
    statistics = InputStatistics(4)
    statistics.add(torch.ones(3, 4))
    assert statistics.finish()[1] is None
