"""The tables against how they are constructed, and against bitsandbytes' own."""

import hashlib
import math
from statistics import NormalDist

import pytest
import torch

from nybble.errors import FormatError
from nybble.formats.codebooks import codebook, dynamic_map, midpoints, nearest_indices, sorted_order
from nybble.formats.format import FORMATS


def test_nf4_is_the_quantiles_of_the_normal_distribution() -> None:
    quantile = NormalDist().inv_cdf
    o = ((1 - 1 / 30) + (1 - 1 / 32)) / 2
    positive = [quantile(o + (0.5 - o) * i / 8) for i in range(8)]
    negative = [-quantile(o + (0.5 - o) * i / 7) for i in range(7)]
    values = torch.tensor(sorted([*positive, 0.0, *negative]), dtype=torch.float64)
    values /= values.max()
    assert (codebook("nf4").double() - values).abs().max() < 2e-7


def test_fp4_is_sign_exponent_mantissa() -> None:
    twelfths = (codebook("fp4") * 12).tolist()
    assert twelfths[:8] == pytest.approx([0, 0.0625, 8, 12, 4, 6, 2, 3], abs=1e-6)
    assert codebook("fp4")[8:].tolist() == [-value for value in codebook("fp4")[:8].tolist()]


def test_int4_levels_are_sevenths() -> None:
    assert (codebook("int4").double() * 7 - torch.arange(-8, 8)).abs().max() < 1e-6
    assert codebook("int4")[15] == 1 and codebook("int4")[1] == -1 and codebook("int4")[8] == 0
    assert codebook("int4_asym").tolist() == list(range(16))


@pytest.mark.parametrize("format", ["nf3", "nf2"])
def test_nf3_and_nf2_are_where_lloyds_iteration_stays(format: str) -> None:
    """An independent derivation: sums over 200,000 quantiles of blocks instead of the module's integral.

    A block of 64 normal values has a largest magnitude m with P(m <= t) = (2 F(t) - 1)^64; the 63 others are normal
    within (-m, m), and m itself is divided to +1.
    """
    levels = codebook(format).double()
    borders = torch.cat([torch.tensor([-1.0]), (levels[1:] + levels[:-1]) / 2, torch.tensor([1.0])]).double()
    probability = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    m = torch.special.ndtri((1 + probability ** (1 / 64)) / 2)
    inside = 2 * torch.special.ndtr(m) - 1
    at = borders[:, None] * m  # (levels + 1, quantiles)
    density, cumulative = torch.exp(-at.square() / 2) / math.sqrt(2 * math.pi), torch.special.ndtr(at)
    moment = (63 * m / inside * (density[:-1] - density[1:])).mean(1)
    mass = (63 * m.square() / inside * (cumulative[1:] - cumulative[:-1])).mean(1)
    moment[-1] += m.square().mean()
    mass[-1] += m.square().mean()
    assert (levels - moment / mass).abs().max() < 1e-5


@pytest.mark.parametrize("format", [format.name for format in FORMATS.values() if format.bitsandbytes])
def test_tables_are_those_of_bitsandbytes(format: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(codebook(format), functional.get_4bit_type(format, device="cpu"))


def test_dynamic_map() -> None:
    table = dynamic_map()
    assert table.shape == (256,) and bool((table.diff() > 0).all())
    assert hashlib.sha256(table.numpy().tobytes()).hexdigest().startswith("e732639a65f497b4")
    assert table[127] == 0 and table[255] == 1


def test_dynamic_map_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(), functional.create_dynamic_map())
    assert torch.equal(dynamic_map(signed=False), functional.create_dynamic_map(signed=False))


@pytest.mark.parametrize("format", FORMATS)
def test_order_and_midpoints_ascend(format: str) -> None:
    order = sorted_order(format)
    assert sorted(order.tolist()) == list(range(2 ** FORMATS[format].bits))
    assert bool((codebook(format)[order.long()].diff() >= 0).all())
    assert bool((midpoints(format).diff() > 0).all())


@pytest.mark.parametrize("format", FORMATS)
def test_zero_gets_the_index_of_zero(format: str) -> None:
    assert nearest_indices(torch.zeros(1), format).tolist() == [FORMATS[format].zero_index]


def test_unknown_format() -> None:
    with pytest.raises(FormatError, match="nf5"):
        codebook("nf5")


def test_tables_do_not_depend_on_when_they_are_made() -> None:
    """Tables are cached, so the surroundings of their first use must leave no mark on them."""
    makers = [lambda: codebook("nf4"), lambda: codebook("fp4"), lambda: codebook("int4"), lambda: midpoints("nf4")]
    makers += [lambda: codebook("int4_asym"), lambda: sorted_order("fp4"), dynamic_map]
    before = [make() for make in makers]
    for table in (codebook, midpoints, sorted_order, dynamic_map):
        table.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            after = [make() for make in makers]
    finally:
        torch.set_default_dtype(torch.float32)
    for old, new in zip(before, after, strict=True):
        assert new.device.type == "cpu" and new.dtype == old.dtype and torch.equal(new, old)
