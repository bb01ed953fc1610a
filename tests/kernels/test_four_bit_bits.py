"""Quantise and dequantise give the reference's bytes and bits: in C++ on every instruction set this CPU has, in Triton
where its interpreter runs.
"""

import functools
import itertools
from dataclasses import replace

import pytest
import torch

from nybble.errors import FormatError
from nybble.formats import blockwise
from nybble.formats.format import FORMATS
from nybble.formats.quant_spec import BLOCK_SIZES, QuantSpec
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels import registry
from nybble.kernels.backends.cpp import library
from nybble.kernels.ops.four_bit import dequantize, dequantize_into, gemv_4bit, quantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1,), (2,), (63,), (65,), (31, 3), (7, 33), (48, 80), (3, 5, 77), (130, 257), (256, 576))
INTERPRETED = ("triton",)  # slow: they get fewer cases


def bodies(op):
    """Backends that are made for the CPU, of those that run; C++ once for each instruction set."""
    backends = [row.backend for row in registry.available() if (row.op, row.device, row.available) == (op, "cpu", True)]
    return [name for backend in backends for name in (library.supported_isas() if backend == "cpp" else (backend,))]


@pytest.fixture
def body(request):
    """Runs, and no other."""
    if request.param in library.ISAS:
        with registry.use("cpp"), library.use_isa(request.param):
            yield request.param
    else:
        with registry.use(request.param):
            yield request.param


cpp = pytest.mark.skipif(library.why_unavailable() is not None, reason=str(library.why_unavailable()))
quantises = pytest.mark.parametrize("body", bodies("quantize_4bit"), indirect=True)
dequantises = pytest.mark.parametrize("body", bodies("dequantize_4bit"), indirect=True)


def weights(shape, dtype, seed=0):
    """Normal values with what could go wrong in them: zero blocks, midpoints, tiny, huge and equal values."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) * torch.rand(shape[:1] + (1,) * (len(shape) - 1), generator=generator)
    flat = w.view(-1)
    if len(flat) > 3000:
        flat[64:192] = 0
        flat[192:256] = -0.0
        flat[256:320] *= 1e-40  # subnormal
        flat[320:384] *= 1e30 if dtype != torch.float16 else 1e3
        flat[384:448] = 1e-39
        flat[448:512] = flat[448:512].abs() + 1
        flat[512:576] = -flat[512:576].abs() - 1
        flat[576:592] = torch.tensor([1.0, *blockwise.codebooks.midpoints("nf4").tolist()])
        flat[592:640] = 0.5
    return w.to(dtype)


@functools.cache  # bodies share it
def reference(shape, dtype, spec):
    return blockwise.quantize(weights(shape, dtype), spec)


def sizes(body, dtype):
    """Block sizes with shapes: all pairs, or each block size once or twice and not with the largest shape; then each
    pair with one of the types, which differ in how a result is rounded alone.
    """
    if body in INTERPRETED:
        return list(itertools.product(BLOCK_SIZES, SHAPES[:-1]))[::8][DTYPES.index(dtype) :: len(DTYPES)]
    return list(itertools.product(BLOCK_SIZES, SHAPES))


@quantises
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantise_gives_the_references_bytes(body, format, double_quant, dtype):
    few = ((32, (48, 80)), (512, (3, 5, 77)))  # one program each
    for block_size, shape in few if body in INTERPRETED else sizes(body, dtype):
        spec = QuantSpec(format, block_size, double_quant)
        expected = reference(shape, dtype, spec)
        got = quantize(weights(shape, dtype), spec)
        assert torch.equal(got.packed, expected.packed), (spec, shape)
        assert torch.equal(got.scales, expected.scales), (spec, shape)
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)


@dequantises
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # NumPy, which interprets; fp16 gets infinities
def test_dequantise_gives_the_references_bits(body, format, double_quant, dtype):
    for block_size, shape in sizes(body, dtype):
        spec = QuantSpec(format, block_size, double_quant)
        q = reference(shape, torch.float32, spec)
        poisoned = torch.full(q.shape, torch.nan, dtype=dtype)
        dequantize_into(q, poisoned)
        assert torch.equal(bits(poisoned), bits(blockwise.dequantize(q, dtype))), (spec, shape)


@dequantises
@pytest.mark.parametrize("format", FORMATS)
def test_packed_bytes_may_lie_anywhere(body, format):
    """Where a block's tensors share a buffer, scales are aligned for four bytes and packed indices for none."""
    q = reference((48, 80), torch.float32, QuantSpec(format, 64))
    expected = bits(blockwise.dequantize(q, torch.bfloat16))
    for place in range(1, 4):
        packed = torch.empty(q.packed.numel() + place, dtype=torch.uint8)[place:].view(q.packed.shape).copy_(q.packed)
        out = torch.full((place + 48 * 80,), torch.nan, dtype=torch.bfloat16)[place:].view(q.shape)
        dequantize_into(replace(q, packed=packed), out)
        assert torch.equal(bits(out), expected), place


@dequantises
@pytest.mark.parametrize("format", FORMATS)
def test_every_index_and_scale_code_dequantises_as_in_the_reference(body, format):
    """All 256 bytes under all 256 scale codes, whether or not a quantiser would write them; negative scales too."""
    shape = (256, 512)
    spec = QuantSpec(format, 512, double_quant=True)
    columns = torch.arange(spec.packed_shape(shape)[1])
    packed = (torch.arange(256)[:, None] + columns).to(torch.uint8)  # every row begins elsewhere
    scales = torch.randint(0, 256, (spec.scales_bytes(256 * 512),), dtype=torch.uint8)
    scales[:8] = torch.tensor([0.3, -1.7]).view(torch.uint8)
    scales[8:264] = torch.arange(256, dtype=torch.uint8)
    q = QuantizedTensor(packed, scales, spec, shape, torch.float32)
    for dtype in DTYPES[:1] if body in INTERPRETED else DTYPES:
        assert torch.equal(bits(dequantize(q, dtype)), bits(blockwise.dequantize(q, dtype)))


@dequantises
def test_nothing_is_written_beyond_the_outputs(body):
    for numel in (1, 5, 31, 33, 64, 95, 1000):
        q = blockwise.quantize(weights((numel,), torch.float32), QuantSpec("nf4", 32))
        for dtype in DTYPES:
            buffer = torch.full((numel + 64,), 7.0, dtype=dtype)
            dequantize_into(q, buffer[:numel])
            assert (buffer[numel:] == 7).all()


@quantises
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 63, 64, 99])
def test_weights_that_are_not_finite_are_refused(body, format, bad, place):
    if body in INTERPRETED and place in (0, 64):
        pytest.skip("takes long, and is like the other places in a block")
    w = torch.randn(100)
    w[place] = bad
    with pytest.raises(FormatError, match="1 of 100 values are not finite"):
        quantize(w, QuantSpec(format))


@quantises
@pytest.mark.filterwarnings("ignore:overflow encountered")  # NumPy, which interprets
def test_a_spread_that_overflows_is_refused(body):
    with pytest.raises(FormatError, match="spread of a block's values overflows"):
        quantize(torch.tensor([3e38, -3e38]), QuantSpec("int4_asym"))


@cpp
def test_the_result_does_not_depend_on_the_number_of_threads():
    w, spec = weights((300, 577), torch.bfloat16), QuantSpec()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with registry.use("cpp"):
                q = quantize(w, spec)
                results.append((q.packed, q.scales, dequantize(q, torch.bfloat16)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def bits(x):
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@cpp
def test_default_dtype_and_device_of_the_caller_do_not_matter() -> None:
    """transformers changes both while it builds a model; a buffer of another size would be written past its end."""
    weight = torch.randn(40, 64)
    expected = quantize(weight, QuantSpec())
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            q = quantize(weight, QuantSpec())
            dense = dequantize(q, torch.float32)
            product = gemv_4bit(weight.new_ones(1, 64), q)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(q.packed, expected.packed) and torch.equal(q.scales, expected.scales)
    assert torch.equal(dense, dequantize(expected, torch.float32))
    torch.testing.assert_close(product[0], dense.sum(1), rtol=1e-4, atol=1e-4)
