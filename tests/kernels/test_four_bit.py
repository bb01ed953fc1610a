"""The four-bit ops as torch ops: opcheck, fakes, checks, and every backend against nybble.formats.blockwise."""

from typing import Any

import pytest
import torch

from nybble.errors import FormatError, KernelError
from nybble.formats import blockwise
from nybble.formats.format import FORMATS
from nybble.formats.quant_spec import QuantSpec
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels import registry
from nybble.kernels.ops import four_bit
from nybble.kernels.ops.four_bit import dequantize_into, quantize

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.ENVIRONMENT_VARIABLE, raising=False)


def weight(shape: tuple[int, ...] = (6, 100), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)


def dequantize_arguments(q: QuantizedTensor) -> tuple[Any, ...]:
    return q.packed, q.scales, list(q.shape), q.spec.format, q.spec.block_size, q.spec.double_quant


@pytest.mark.parametrize("format", ["nf4", "int4_asym", "nf3", "nf2"])  # each with another layout of its bytes
@pytest.mark.parametrize(("shape", "double_quant"), [((4, 128), True), ((3, 7), False)])
def test_opcheck(shape: tuple[int, ...], double_quant: bool, format: str) -> None:
    with registry.use("reference"):
        q = quantize(weight(shape), QuantSpec(format, 64, double_quant))
        torch.library.opcheck(torch.ops.nybble.quantize_4bit, (weight(shape), format, 64, double_quant))
        torch.library.opcheck(torch.ops.nybble.dequantize_4bit, (*dequantize_arguments(q), torch.bfloat16))
        torch.library.opcheck(
            torch.ops.nybble.dequantize_4bit_out, (*dequantize_arguments(q), torch.empty(shape, dtype=torch.bfloat16))
        )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(4, 128), (3, 7), (65,), (2, 3, 50)])
def test_wrappers_give_the_truth(shape: tuple[int, ...], double_quant: bool, format: str) -> None:
    spec = QuantSpec(format, 64, double_quant)
    for dtype in FLOATS:
        w = weight(shape, dtype).requires_grad_()
        q, truth = quantize(w, spec), blockwise.quantize(w, spec)
        assert (q.shape, q.dtype, q.spec) == (truth.shape, dtype, spec)
        assert torch.equal(q.packed, truth.packed) and torch.equal(q.scales, truth.scales)
        values = four_bit.dequantize(q, dtype)
        assert not values.requires_grad and torch.equal(values, blockwise.dequantize(truth, dtype))
        out = torch.full(shape, torch.nan, dtype=dtype)
        dequantize_into(q, out)
        assert torch.equal(out, values)


def test_a_strided_weight() -> None:
    w = weight((64, 96))
    q = quantize(w.t(), QuantSpec())
    assert q.shape == (96, 64) and torch.equal(q.packed, blockwise.quantize(w.t(), QuantSpec()).packed)


@pytest.mark.parametrize("format", FORMATS)
def test_meta_and_compile_see_the_same_shapes(format: str) -> None:
    spec = QuantSpec(format, 64)
    for shape in ((4, 128), (3, 7)):
        q = quantize(weight(shape), spec)
        skeleton = quantize(weight(shape).to("meta"), spec)
        assert (skeleton.packed.shape, skeleton.scales.shape) == (q.packed.shape, q.scales.shape)
        assert four_bit.dequantize(skeleton, torch.float16).shape == shape


def test_torch_compile_keeps_the_op_in_the_graph() -> None:
    q = quantize(weight((4, 128)), QuantSpec())

    def linear(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return x @ torch.ops.nybble.dequantize_4bit(packed, scales, [4, 128], "nf4", 64, True, torch.float32).t()

    x = weight((2, 128))
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, q.packed, q.scales), linear(x, q.packed, q.scales))


def test_wrong_arguments_are_refused() -> None:
    q = quantize(weight(), QuantSpec())
    packed, scales, *rest = dequantize_arguments(q)
    dequantize, into = torch.ops.nybble.dequantize_4bit, torch.ops.nybble.dequantize_4bit_out
    for arguments in (
        (packed.view(-1)[:-1], scales, *rest),
        (packed, scales[:-1], *rest),
        (packed.int(), scales, *rest),
        (packed, scales.view(1, -1).expand(2, -1)[:, ::2], *rest),
        (packed, scales, [6, 101], *rest[1:]),
        (packed, scales, [6, 100], "nf5", 64, True),
        (packed, scales, [6, 100], "nf4", 63, True),
        (packed, scales, [6, 100], "nf4", 32, True),
        (packed, scales, [6, 100], "nf4", 64, False),
        (packed, scales, [6, 100], "int4_asym", 64, True),
        (packed, scales.to("meta"), *rest),
    ):
        with pytest.raises(FormatError):
            dequantize(*arguments, torch.float32)
    with pytest.raises(FormatError, match=r"torch\.int32"):
        four_bit.dequantize(q, torch.int32)
    for out in (torch.empty(600), torch.empty(100, 6).t(), torch.empty(6, 100, device="meta"), torch.empty(6, 99)):
        with pytest.raises(FormatError, match="out has shape"):
            into(packed, scales, *rest, out)
    for bad in (torch.empty(0, 3), torch.ones(3, dtype=torch.int32), torch.ones(3, dtype=torch.float64)):
        with pytest.raises(FormatError):
            quantize(bad, QuantSpec())


@pytest.mark.parametrize("format", FORMATS)
def test_non_finite_weights_are_refused(format: str) -> None:
    w = weight()
    w[3, 5] = torch.nan
    with pytest.raises(FormatError, match="1 of 600 values are not finite"):
        quantize(w, QuantSpec(format))


def test_a_backend_of_another_device_is_refused() -> None:
    with registry.use("bitsandbytes"), pytest.raises(KernelError, match="runs on cuda only"):
        quantize(weight(), QuantSpec())


def test_the_environment_forces_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def count(q: QuantizedTensor, out: torch.Tensor) -> None:
        calls.append(q.shape)
        truth(q, out)

    truth = blockwise.dequantize_into
    monkeypatch.setattr(blockwise, "dequantize_into", count)
    monkeypatch.setenv("NYBBLE_KERNELS", "reference")
    four_bit.dequantize(blockwise.quantize(weight(), QuantSpec()), torch.float32)
    assert calls == [(6, 100)]


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (5, 100), (3, 7), (65,)])
def test_cuda_reads_the_same_values(shape: tuple[int, ...], double_quant: bool, format: str) -> None:
    q = blockwise.quantize(weight(shape), QuantSpec(format, 64, double_quant))
    on_gpu = QuantizedTensor(q.packed.cuda(), q.scales.cuda(), q.spec, q.shape, q.dtype)
    for dtype in FLOATS:
        truth = blockwise.dequantize(q, dtype)
        assert torch.equal(four_bit.dequantize(on_gpu, dtype).cpu(), truth)
        with registry.use("reference"):
            assert torch.equal(four_bit.dequantize(on_gpu, dtype).cpu(), truth)
        out = torch.full(shape, torch.nan, dtype=dtype, device="cuda")
        dequantize_into(on_gpu, out)
        assert torch.equal(out.cpu(), truth)


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_cuda_quantizes_as_near_as_the_truth(format: str) -> None:
    w, spec = weight((64, 128)), QuantSpec(format, 64)
    error = (four_bit.dequantize(quantize(w.cuda(), spec), torch.float32).cpu() - w).norm()
    truth = (blockwise.dequantize(blockwise.quantize(w, spec), torch.float32) - w).norm()
    assert float(error) <= float(truth) * 1.001


@pytest.mark.gpu
def test_cuda_refuses_non_finite_weights() -> None:
    w = weight().cuda()
    w[0, 0] = torch.inf
    with pytest.raises(FormatError, match="1 of 600"):
        quantize(w, QuantSpec())
