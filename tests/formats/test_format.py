"""What an entry of the table gives by itself: formats that stand nowhere else go through everything but the options."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save

from nybble.calibration.search import search_weight
from nybble.errors import FormatError
from nybble.formats import blockwise, bnb
from nybble.formats.format import FORMATS, Format, named_format
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.kernels.ops.four_bit import dequantize, quantize
from nybble.layers.quantized_linear import QuantizedLinear

# Levels without a zero, in no order; and signed scales.
LEVELS = tuple((2 * i - 15) / 15 * abs((2 * i - 15) / 15) for i in range(16))
SHUFFLED = tuple(7 * i % 16 for i in range(16))  # an index's rank among the levels
MADE_UP = (
    Format("made_up", LEVELS),
    Format(
        "made_up_shuffled",
        tuple(LEVELS[rank] for rank in SHUFFLED),
        tuple(SHUFFLED.index(rank) for rank in range(16)),
        bitsandbytes=True,
    ),
    Format("made_up_3_bits", (-0.8, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0), signed=True),
)


@pytest.fixture(params=MADE_UP, ids=lambda format: format.name)
def format(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Format:
    monkeypatch.setitem(FORMATS, request.param.name, request.param)
    return request.param


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_each_value_is_the_nearest_level_on_every_backend(format: Format) -> None:
    for shape in ((24, 100), (3, 7)):
        w, spec = weight(*shape), QuantSpec(format.name, 64, double_quant=False)
        q, truth = quantize(w, spec), blockwise.quantize(w, spec)
        assert torch.equal(q.packed, truth.packed) and torch.equal(q.scales, truth.scales)
        assert q.nbytes == spec.bytes(w.numel())
        values = dequantize(q, torch.float32)
        assert torch.equal(values, blockwise.dequantize(q, torch.float32))
        levels, scale = torch.tensor(format.levels), blockwise.block_scales(q)
        scale = scale.repeat_interleave(64)[: w.numel()].view(shape)
        nearest = levels[((w / scale)[..., None] - levels).abs().argmin(-1)]
        torch.testing.assert_close(values, nearest * scale)


@pytest.mark.parametrize("double_quant", [False, True])
def test_stored_it_comes_back(format: Format, double_quant: bool) -> None:
    spec = QuantSpec(format.name, 32, double_quant)
    q = quantize(weight(24, 100), spec)
    stored = load(save(bnb.to_bnb("w.weight", q)))
    assert bnb.is_quantized("w.weight", stored)
    again = bnb.from_bnb("w.weight", stored)
    assert again.spec == spec and torch.equal(again.packed, q.packed) and torch.equal(again.scales, q.scales)
    for formats in (BaseFormats(spec), BaseFormats(spec, {"a": format.name, "b": "nf4"})):
        config = bnb.quantization_config(formats, torch.bfloat16, [])
        assert bnb.formats_from_config({"quantization_config": config}) == formats
        assert (config["quant_method"] == "bitsandbytes") == (format.bitsandbytes and not formats.layers)


def test_a_layer_computes_with_it(format: Format) -> None:
    layer = QuantizedLinear(100, 24, False, QuantSpec(format.name), torch.float32)
    layer.load_quantized(quantize(weight(24, 100), layer.spec))
    x = weight(5, 100).requires_grad_()
    dense_x = x.detach().clone().requires_grad_()
    y, dense_y = layer(x), F.linear(dense_x, layer.dequantize())
    y.sum().backward()
    dense_y.sum().backward()
    torch.testing.assert_close(y, dense_y)
    torch.testing.assert_close(x.grad, dense_x.grad)


def test_its_scales_can_be_searched(format: Format) -> None:
    w, spec = weight(64, 128), QuantSpec(format.name)
    errors = [
        float((w - blockwise.dequantize(q, torch.float32)).square().sum())
        for q in (search_weight(w, spec), quantize(w, spec))
    ]
    assert errors[0] < errors[1]


def test_an_unknown_format_is_named_with_those_there_are() -> None:
    for make in (lambda: named_format("nf5"), lambda: QuantSpec("nf5"), lambda: BaseFormats(QuantSpec(), {"a": "nf5"})):
        with pytest.raises(FormatError, match=r"'nf5'(.|\n)*nf4, fp4"):
            make()


def test_layers_are_alike_or_each_by_its_own_entry() -> None:
    spec = QuantSpec("fp4", 128, False)
    assert BaseFormats(spec).of("any") == spec and BaseFormats(spec).names == ["fp4"]
    mixed = BaseFormats(spec, {"a": "nf2", "b": "nf4", "c": "nf2"})
    assert mixed.of("a") == QuantSpec("nf2", 128, False) and mixed.names == ["nf2", "nf4"]
    with pytest.raises(KeyError):
        mixed.of("d")


@pytest.mark.parametrize(("block_size", "double_quant"), [(64, True), (64, False), (32, True)])
@pytest.mark.parametrize("name", [*FORMATS])
def test_some_rows_are_a_matrix_of_their_own(name: str, block_size: int, double_quant: bool) -> None:
    for shape in ((200, 128), (90, 192), (70, 320)):
        q = quantize(weight(*shape), QuantSpec(name, block_size, double_quant))
        values, multiple = dequantize(q, torch.float32), q.spec.row_multiple(shape[1])
        for start in range(0, shape[0], multiple):
            stop = min(shape[0], start + 2 * multiple)
            part = q.rows(start, stop)
            assert torch.equal(dequantize(part, torch.float32), values[start:stop])
            assert part.packed.data_ptr() == q.packed[start:].data_ptr()
    assert QuantSpec(name, block_size).row_multiple(block_size + 1) == 0
