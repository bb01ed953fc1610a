"""ggml's blocks against the gguf package, bit for bit, on every backend that computes with them."""

import gguf
import pytest
import torch
from tiny_gguf import random_blocks

from nybble.errors import FormatError
from nybble.formats.format import STORED_FORMATS
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels import registry
from nybble.kernels.ops.four_bit import dequantize, gemv_4bit, quantize


def expected(q: QuantizedTensor) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType[q.spec.format.upper()]
    return torch.from_numpy(gguf.dequantize(q.packed.numpy(), kind))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("format", STORED_FORMATS)
def test_values_are_those_of_the_gguf_package(format: str, backend: str) -> None:
    q = random_blocks(format, 70, 512)  # more than one turn of the parallel loop
    values = expected(q)
    if backend == "cpp":
        try:
            registry.backend_of("dequantize_4bit", "cpu", "cpp", (q.packed, q.scales, q.shape, format, 0, False))
        except ValueError as error:
            pytest.skip(str(error))
    with registry.use(backend):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(dequantize(q, dtype), values.to(dtype)), dtype
        x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(gemv_4bit(x, q), x @ values.T, rtol=1e-5, atol=1e-5)


def test_the_op_is_well_formed_and_blocks_are_never_made() -> None:
    q = random_blocks("q4_k", 4, 256)
    arguments = (q.packed, q.scales, q.shape, q.spec.format, q.spec.block_size, False, torch.float32)
    torch.library.opcheck(torch.ops.nybble.dequantize_4bit.default, arguments)
    assert q.nbytes == 4 * 144 and q.spec.bytes(q.numel) == q.nbytes
    with pytest.raises(FormatError, match="read and never made"):
        quantize(torch.ones(4, 256), q.spec)
    with pytest.raises(FormatError, match="no way to store q4_k"):
        type(q.spec)("q4_k", 64, True)
