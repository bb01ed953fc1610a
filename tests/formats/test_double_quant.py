"""Double quantisation against an exhaustive search, and against bitsandbytes."""

import pytest
import torch
from torch import Tensor

from nybble.errors import FormatError
from nybble.formats.codebooks import dynamic_map
from nybble.formats.double_quant import dequantize_scales, quantize_scales

COUNTS = [1, 2, 100, 255, 256, 257, 512, 4099]


def scales(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, generator=generator) * 0.1 + 0.01


def distance(codes: Tensor, absmax2: Tensor, offset: Tensor, absmax: Tensor) -> Tensor:
    """How far each code lies from its scale, in units of absmax2, in fp64."""
    spread = absmax2.double().repeat_interleave(256)[: len(absmax)]
    scaled = (absmax - offset).double() / spread.clamp(min=1e-38)
    return (dynamic_map().double()[codes.long()] - scaled).abs()


@pytest.mark.parametrize("count", COUNTS)
def test_codes_are_the_nearest(count: int) -> None:
    absmax = scales(count)
    codes, absmax2, offset = quantize_scales(absmax)
    spread = absmax2.double().repeat_interleave(256)[:count]
    scaled = (absmax - offset).double() / spread.clamp(min=1e-38)
    best = (dynamic_map().double()[None, :] - scaled[:, None]).abs().amin(dim=1)
    assert bool((distance(codes, absmax2, offset, absmax) <= best + 1e-7).all())


@pytest.mark.parametrize("count", COUNTS)
def test_offset_and_absmax2_are_those_of_bitsandbytes_and_codes_no_further(count: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    absmax = scales(count)
    codes, absmax2, offset = quantize_scales(absmax)
    theirs, state = functional.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert torch.equal(offset, absmax.mean().reshape(1))
    assert torch.equal(absmax2, state.absmax)
    # Its CPU kernel finds codes through a table of 65,536 bins: where it differs it must not be nearer.
    differ = codes != theirs
    ours = distance(codes, absmax2, offset, absmax)[differ]
    assert bool((ours <= distance(theirs, absmax2, offset, absmax)[differ] + 1e-7).all())
    assert float(differ.float().mean()) < 0.02 or count == 1 or not absmax2.all()


def test_whole_weight_against_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(130, 515, generator=torch.Generator().manual_seed(1))
    _, plain = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    _, nested = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    codes, absmax2, offset = quantize_scales(plain.absmax)
    assert torch.equal(offset[0], nested.offset)
    assert torch.equal(absmax2, nested.state2.absmax)
    assert float((codes != nested.absmax).float().mean()) < 0.02


@pytest.mark.parametrize("count", COUNTS)
def test_decoding_is_a_product_then_a_sum(count: int) -> None:
    codes, absmax2, offset = quantize_scales(scales(count))
    decoded = dequantize_scales(codes, absmax2, offset)
    for i in range(0, count, 37):
        product = dynamic_map()[int(codes[i])] * absmax2[i // 256]
        assert decoded[i] == product + offset[0]
    assert float((decoded - scales(count)).abs().max()) < 0.02 * float(scales(count).max())


@pytest.mark.parametrize("count", [1, 256, 300])
def test_equal_scales_decode_exactly(count: int) -> None:
    absmax = torch.full((count,), 0.25)
    codes, absmax2, offset = quantize_scales(absmax)
    assert torch.equal(absmax2, torch.zeros(-(-count // 256)))
    assert torch.equal(dequantize_scales(codes, absmax2, offset), absmax)


def test_overflow_is_refused() -> None:
    with pytest.raises(FormatError, match="overflow"):
        quantize_scales(torch.full((64,), 3e38))
