"""Searched weights: ordinary four-bit tensors that lose less than absmax's."""

import pytest
import torch

from nybble.calibration.search import search_weight
from nybble.errors import FormatError
from nybble.formats import blockwise
from nybble.formats.format import FORMATS
from nybble.formats.quant_spec import QuantSpec


def weight(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)


def lost(w: torch.Tensor, spec: QuantSpec, importance: torch.Tensor | None = None, searched: bool = True) -> float:
    q = search_weight(w, spec, importance) if searched else blockwise.quantize(w, spec)
    h = torch.ones(w.shape[-1]) if importance is None else importance
    return float((h * (w - blockwise.dequantize(q, torch.float32)) ** 2).sum())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("format", [format.name for format in FORMATS.values() if format.searchable])
@pytest.mark.parametrize("shape", [(33, 128), (7, 100), (300, 64)])
def test_search_loses_less_than_absmax(format: str, double_quant: bool, shape: tuple[int, int]) -> None:
    spec, w = QuantSpec(format, 64, double_quant), weight(*shape)
    assert lost(w, spec) < 0.97 * lost(w, spec, searched=False)


def test_importance_is_heeded() -> None:
    spec, w = QuantSpec(), weight(64, 256)
    importance = torch.rand(256, generator=torch.Generator().manual_seed(1)) ** 8
    weighted, plain = search_weight(w, spec, importance), search_weight(w, spec)
    errors = [(w - blockwise.dequantize(q, torch.float32)) ** 2 for q in (weighted, plain)]
    assert (errors[0] * importance).sum() < 0.8 * (errors[1] * importance).sum()


def test_both_signs_lose_less_than_one() -> None:
    spec, w = QuantSpec(double_quant=False), weight(64, 256)

    def error(signs: tuple[int, ...]) -> float:
        return float((w - blockwise.dequantize(search_weight(w, spec, signs=signs), torch.float32)).square().sum())

    assert error((1, -1)) < error((1,))


def test_any_shape_and_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q = search_weight(weight(3, 35).to(dtype), QuantSpec("nf4", 32, True))
        assert (q.shape, q.dtype) == ((3, 35), dtype)


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(FormatError, match="zero points"):
        search_weight(weight(4, 64), QuantSpec("int4_asym"))
    with pytest.raises(FormatError, match="1 of 256 values are not finite"):
        w = weight(4, 64)
        w[1, 3] = torch.nan
        search_weight(w, QuantSpec())
