"""Quantise and dequantise: bit for bit against bitsandbytes, and against formulas written out anew here."""

import math
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nybble.errors import FormatError
from nybble.formats import blockwise
from nybble.formats.codebooks import codebook
from nybble.formats.format import FORMATS
from nybble.formats.quant_spec import BLOCK_SIZES, QuantSpec
from nybble.formats.quantized_tensor import QuantizedTensor

SHAPES = [(64, 128), (5, 100), (3, 7), (33, 65), (1,), (2,), (63,), (64,), (65,), (4097,), (2, 3, 50), (40, 4112)]
BITSANDBYTES = [format.name for format in FORMATS.values() if format.bitsandbytes]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def weights(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal weights of mixed magnitude, with a run of zeros."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) * torch.rand(shape[0], generator=generator).view(
        -1, *[1] * (len(shape) - 1)
    )
    flat = w.view(-1)
    flat[len(flat) // 3 : len(flat) // 3 + 140] = 0
    return w.to(dtype)


def indices(q: QuantizedTensor) -> Tensor:
    packed = q.packed.view(-1)
    if q.spec.bits < 4:
        return torch.tensor(indices_of_planes(q))
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: q.numel].long()


def indices_of_planes(q: QuantizedTensor) -> list[int]:
    """nf3 and nf2, one element at a time, as the layout is written down."""
    data, found = q.packed.view(-1).tolist(), []
    for start in range(0, q.numel, q.spec.block_size):
        count = min(q.spec.block_size, q.numel - start)
        low, data = data[: -(-count // 4)], data[-(-count // 4) :]
        index = [low[i // 4] >> 2 * (i % 4) & 3 for i in range(count)]
        if q.spec.bits == 3:
            high, data = data[: -(-count // 8)], data[-(-count // 8) :]
            index = [value + 4 * (high[i // 8] >> i % 8 & 1) for i, value in enumerate(index)]
        found += index
    assert not data
    return found


def naive_dequantize(q: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """One gather, one product, one rounding; scales spread to every element."""
    parts = q.scale_parts()
    spread = torch.arange(q.numel) // q.spec.block_size
    values = codebook(q.spec.format)[indices(q)]
    if parts.zero_points is not None:
        values = values - parts.zero_points[spread].float()
    return (values * blockwise.block_scales(q)[spread]).to(dtype).view(q.shape)


# ---- against bitsandbytes ------------------------------------------------------------------------


def assert_same_bytes_as_bitsandbytes(w: Tensor, format: str, block_size: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(w, blocksize=block_size, quant_type=format)
    q = blockwise.quantize(w, QuantSpec(format, block_size, double_quant=False))
    assert torch.equal(q.packed.view(-1), packed.view(-1))
    absmax = q.scale_parts().absmax
    assert absmax is not None
    assert torch.equal(absmax.view(torch.int32), state.absmax.view(torch.int32))


@pytest.mark.parametrize("format", BITSANDBYTES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_of_bitsandbytes(shape: tuple[int, ...], dtype: torch.dtype, format: str) -> None:
    assert_same_bytes_as_bitsandbytes(weights(shape, dtype=dtype), format, 64)


@pytest.mark.parametrize("format", BITSANDBYTES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_bytes_of_bitsandbytes_at_every_block_size(block_size: int, format: str) -> None:
    assert_same_bytes_as_bitsandbytes(weights((37, 517)), format, block_size)


@pytest.mark.parametrize("format", BITSANDBYTES)
@pytest.mark.parametrize("value", [0.0, 1e-40, -1e-40, 1e-38, 1e-20, 3e38, -0.0])
@pytest.mark.parametrize("count", [1, 64, 70, 129])
def test_bytes_of_bitsandbytes_at_extremes(count: int, value: float, format: str) -> None:
    w = torch.full((count,), value)
    w[::3] *= -0.3
    assert_same_bytes_as_bitsandbytes(w, format, 64)


@pytest.mark.parametrize("format", BITSANDBYTES)
def test_bytes_of_bitsandbytes_on_ties_and_neighbours(format: str) -> None:
    levels = codebook(format).sort().values
    ties = (levels[:-1] + levels[1:]) / 2
    w = torch.cat([torch.ones(1), ties, ties.nextafter(torch.tensor(9.0)), ties.nextafter(torch.tensor(-9.0)), levels])
    assert_same_bytes_as_bitsandbytes(w, format, 64)


@pytest.mark.parametrize("format", BITSANDBYTES)
def test_bytes_of_bitsandbytes_across_panels(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "PANEL", 4096)
    assert_same_bytes_as_bitsandbytes(weights((103, 333)), format, 64)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 700),
    block_size=st.sampled_from(BLOCK_SIZES),
    format=st.sampled_from(BITSANDBYTES),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 10_000),
)
def test_bytes_of_bitsandbytes_anywhere(
    count: int, block_size: int, format: str, dtype: torch.dtype, seed: int
) -> None:
    assert_same_bytes_as_bitsandbytes(weights((count,), seed, dtype), format, block_size)


@pytest.mark.parametrize("format", BITSANDBYTES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(64, 128), (5, 100), (3, 7), (65,)])
def test_values_of_bitsandbytes(shape: tuple[int, ...], dtype: torch.dtype, format: str) -> None:
    # bitsandbytes' CPU kernel is wrong where rows are not whole blocks, so the values come from the formula
    # of its device-independent backend, without the torch.compile around it.
    default = pytest.importorskip("bitsandbytes.backends.default.ops")
    q = blockwise.quantize(weights(shape), QuantSpec(format, 64, double_quant=False))
    theirs = default._dequantize_4bit_compute.__wrapped__(
        q.packed.view(-1), blockwise.block_scales(q), codebook(format), 64, shape, dtype
    )
    assert torch.equal(blockwise.dequantize(q, dtype), theirs)


@pytest.mark.parametrize("format", BITSANDBYTES)
@pytest.mark.parametrize("block_size", [64, 256, 1024])
def test_values_of_bitsandbytes_cpu_kernel(format: str, block_size: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weights((48, 2048))
    packed, state = functional.quantize_4bit(w, blocksize=block_size, quant_type=format)
    q = blockwise.quantize(w, QuantSpec(format, block_size, double_quant=False))
    assert torch.equal(blockwise.dequantize(q, torch.float32), functional.dequantize_4bit(packed, state))


# ---- on their own --------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_is_the_naive_formula(shape: tuple[int, ...], double_quant: bool, format: str) -> None:
    q = blockwise.quantize(weights(shape), QuantSpec(format, 64, double_quant))
    for dtype in FLOATS:
        assert torch.equal(blockwise.dequantize(q, dtype), naive_dequantize(q, dtype))


@pytest.mark.parametrize("format", FORMATS)
def test_panels_change_nothing(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, spec = weights((103, 333)), QuantSpec(format, 32, double_quant=True)
    whole = blockwise.quantize(w, spec)
    values = blockwise.dequantize(whole, torch.float32)
    monkeypatch.setattr(blockwise, "PANEL", 4096)
    q = blockwise.quantize(w, spec)
    assert torch.equal(q.packed, whole.packed) and torch.equal(q.scales, whole.scales)
    assert torch.equal(blockwise.dequantize(q, torch.float32), values)


@pytest.mark.parametrize("format", [format.name for format in FORMATS.values() if not format.zero_points])
def test_each_value_is_the_nearest_level(format: str) -> None:
    w = weights((50, 128))
    q = blockwise.quantize(w, QuantSpec(format, 64, double_quant=False))
    scaled = w.view(-1, 64).double() / blockwise.block_scales(q).double()[:, None]
    scaled = scaled.nan_to_num(0.0)  # blocks of zeros
    distance = (scaled.view(-1, 1) - codebook(format).double()).abs()
    chosen = distance.gather(1, indices(q)[:, None])[:, 0]
    assert bool((chosen <= distance.amin(dim=1) + 1e-6).all())


@pytest.mark.parametrize("format", ["nf3", "nf2"])
def test_scales_of_nf3_and_nf2_are_the_values_of_largest_magnitude(format: str) -> None:
    w = weights((50, 129))
    w[0, :2], w[0, 2] = torch.tensor([-9.0, 9.0]), 9.0  # of two such, the positive one
    q = blockwise.quantize(w, QuantSpec(format, 64, double_quant=False))
    for block, scale in zip(w.view(-1).split(64), blockwise.block_scales(q).tolist(), strict=True):
        assert abs(scale) == float(block.abs().max()) and (scale in block if scale else True)
    assert blockwise.block_scales(q)[0] == 9.0
    assert torch.equal(
        blockwise.block_scales(blockwise.quantize(-w[1:], q.spec)),
        -blockwise.block_scales(blockwise.quantize(w[1:], q.spec)),
    )


def test_bits_a_weight() -> None:
    """4, 3 and 2 bits and an eighth for double-quantised scales, at whole blocks; rows are whole bytes."""
    for format, bits in (("nf4", 4), ("nf3", 3), ("nf2", 2)):
        spec = QuantSpec(format)
        assert spec.bytes(4096 * 4096) * 8 / 4096**2 == pytest.approx(bits + 8 / 64 + 32 / 64 / 256, abs=1e-4)
        assert spec.packed_shape((10, 192)) == (10, 24 * bits) and spec.packed_shape((3, 7)) == (spec.packed_bytes(21),)
    assert [QuantSpec("nf2").packed_bytes(n) for n in (1, 4, 5, 64, 65)] == [1, 1, 2, 16, 17]
    assert [QuantSpec("nf3").packed_bytes(n) for n in (1, 4, 8, 9, 64, 65, 73)] == [2, 2, 3, 5, 24, 26, 29]


@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("shift", [0.0, 0.5, 3.0, -3.0])
def test_int4_asym_against_its_definition(shift: float, block_size: int) -> None:
    w = weights((20, 100)) + shift
    q = blockwise.quantize(w, QuantSpec("int4_asym", block_size, double_quant=False))
    zero_points = q.scale_parts().zero_points
    assert zero_points is not None
    flat, level = w.view(-1).double(), indices(q)
    for block, (scale, zero_point) in enumerate(
        zip(blockwise.block_scales(q).tolist(), zero_points.tolist(), strict=True)
    ):
        x = flat[block * block_size : (block + 1) * block_size]
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        assert scale == pytest.approx((high - low) / 15, rel=1e-6)
        assert zero_point == (round(-low / scale) if scale else 0)
        error = (level[block * block_size : (block + 1) * block_size] - zero_point) * scale - x
        assert float(error.abs().max()) <= scale * 0.5001  # half a step, at the clamped ends too


def test_int4_asym_keeps_zero_and_constant_blocks() -> None:
    w = torch.zeros(4, 64)
    w[1] = 2.5
    w[2] = -2.5
    w[3, ::2] = torch.rand(32)
    values = blockwise.dequantize(blockwise.quantize(w, QuantSpec("int4_asym", 64, double_quant=False)), torch.float32)
    assert torch.equal(values[:3], w[:3])
    assert torch.equal(values[3, 1::2], torch.zeros(32))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_all_zero(double_quant: bool, format: str) -> None:
    q = blockwise.quantize(torch.zeros(3, 77), QuantSpec(format, 64, double_quant))
    assert torch.count_nonzero(blockwise.dequantize(q, torch.float32)) == 0


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(1,), (65,), (3, 7)])
def test_odd_count_is_padded_with_zero(shape: tuple[int, ...], format: str) -> None:
    q = blockwise.quantize(weights(shape) + 0.25, QuantSpec(format, 64, double_quant=False))
    if q.spec.bits < 4:  # nothing is left over to decode: what no element fills is zero
        unused = -sum(shape[:1]) * math.prod(shape[1:]) % 64 % (4 if q.spec.bits == 2 else 8)
        used_bits = 8 - unused * (2 if q.spec.bits == 2 else 1)
        assert int(q.packed.view(-1)[-1]) >> used_bits == 0
        return
    pad = int(q.packed.view(-1)[-1]) & 15
    zero_points = q.scale_parts().zero_points
    zero = 0 if zero_points is None else int(zero_points[-1])
    assert codebook(format)[pad] == zero


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 100, 129])
def test_non_finite_weights_are_refused(position: int, bad: float, format: str) -> None:
    w = torch.randn(130)
    w[position] = bad
    with pytest.raises(FormatError, match="1 of 130 values are not finite"):
        blockwise.quantize(w, QuantSpec(format, 64))


def test_a_range_beyond_fp32_is_refused() -> None:
    with pytest.raises(FormatError, match="overflows"):
        blockwise.quantize(torch.tensor([3e38, -3e38]), QuantSpec("int4_asym", 64, double_quant=False))
    with pytest.raises(FormatError, match="overflow"):
        blockwise.quantize(torch.full((256,), 3e38), QuantSpec("nf4", 64))


class LargestResult(TorchDispatchMode):
    """Notes the size in bytes of the largest storage that an operation returns, those already known aside."""

    def __init__(self, *known: Tensor):
        super().__init__()
        self.known, self.num_bytes = {tensor.untyped_storage().data_ptr() for tensor in known}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("format", FORMATS)
def test_a_big_weight_needs_only_panels_beyond_source_and_result(format: str) -> None:
    w = torch.randn(2048, 4096).bfloat16()  # 32 MB in fp32, 4 MB in four bits
    with LargestResult(w) as largest:
        q = blockwise.quantize(w, QuantSpec(format, 64))
    assert largest.num_bytes == q.packed.numel()
    out = torch.empty_like(w)
    with LargestResult(w, out, q.packed, q.scales) as largest:
        blockwise.dequantize_into(q, out)
    assert largest.num_bytes <= 4 * blockwise.PANEL


def test_empty_weights_are_refused() -> None:
    with pytest.raises(FormatError, match="no elements"):
        blockwise.quantize(torch.empty(0, 4), QuantSpec())


def test_strided_weights_and_the_source_is_left_alone() -> None:
    w = weights((96, 64))
    copy = w.clone()
    q = blockwise.quantize(w.t(), QuantSpec())
    same = blockwise.quantize(w.t().contiguous(), QuantSpec())
    assert torch.equal(q.packed, same.packed) and torch.equal(q.scales, same.scales)
    assert torch.equal(w, copy)


def test_a_negative_scale_is_legal() -> None:
    q = blockwise.quantize(weights((4, 64)), QuantSpec("nf4", 64, double_quant=False))
    values = blockwise.dequantize(q, torch.float32)
    q.scales.view(torch.float32).neg_()
    assert torch.equal(blockwise.dequantize(q, torch.float32), -values)
