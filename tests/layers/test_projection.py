"""Projections that multiply with some rows of a weight at a time, against those that multiply with all of it."""

from dataclasses import replace

import pytest
import torch
from tiny import SMALL, put_into_four_bits
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from nybble.formats.quant_spec import QuantSpec
from nybble.kernels.ops.four_bit import quantize
from nybble.layers.lora import DoraLinear, LoraLinear
from nybble.layers.projection import DenseWeights, Projection
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.planning.costs import written_out_bytes
from nybble.planning.run_shape import MicroBatches, RunShape
from nybble.planning.shape import shape_of
from nybble.sizes import SHAPE_RULES, panel_rows

pytestmark = pytest.mark.usefixtures("poisoned_slabs")

TOKENS, IN, OUTS = 13, 128, (700, 96, 512)
PANEL = 4 * IN * 200  # of rows in fp32; a weight may be cut after every 128th


def adapted(out_features: int, kind: type[LoraLinear] | None, bias: bool) -> nn.Module:
    base = QuantizedLinear(IN, out_features, bias, QuantSpec(), torch.float32)
    base.load_quantized(quantize(torch.randn(out_features, IN), QuantSpec()))
    if bias:
        base.bias.data = torch.randn(out_features)
    if kind is None:
        return base
    adapter = kind(base, 3, alpha=6.0)
    nn.init.normal_(adapter.lora_B)
    return adapter


def both_ways(projection: Projection, x: Tensor, grad: Tensor, residual: Tensor | None) -> list[Tensor]:
    """Output, gradient of the input, gradients of the adapters."""
    z = projection.low_rank(x)
    y = projection.forward(x, z, residual, 0.7) if residual is not None else projection.forward(x, z)
    grad_z = projection.backward_low_rank(grad)
    return [y, projection.backward_input(grad, grad_z), *projection.backward_adapters(grad, grad_z, x, z)]


@pytest.mark.parametrize("kind", [None, LoraLinear, DoraLinear])
@pytest.mark.parametrize("add", [False, True])
def test_some_rows_at_a_time_are_all_rows(
    kind: type[LoraLinear] | None, add: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    modules = [adapted(out, kind, bias) for out, bias in zip(OUTS, (True, False, True), strict=True)]
    x, grad = torch.randn(TOKENS, IN), torch.randn(TOKENS, sum(OUTS))
    residual = torch.randn(TOKENS, sum(OUTS)) if add else None
    whole = Projection(modules, DenseWeights())
    expected = both_ways(whole, x, grad, residual)
    monkeypatch.setitem(SHAPE_RULES, "cpu", replace(SHAPE_RULES["cpu"], weight_panel_bytes=PANEL))
    weights = DenseWeights()
    taken = [[rows for rows, _ in weights.panels(linear, torch.float32)] for linear in whole.linears]
    assert [len(rows) for rows in taken] == [6, 1, 4]
    assert [rows[-1].stop for rows in taken] == list(OUTS)
    assert sum(buffer.nbytes for buffer in weights.rooms.kept.values()) < 4 * IN * max(OUTS)
    for got, wanted in zip(both_ways(Projection(modules, weights), x, grad, residual), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(("rows", "multiple"), [(700, 128), (700, 0), (64, 128), (35840, 16), (17, 1)])
def test_panels_are_even_and_hold_what_they_may(rows: int, multiple: int) -> None:
    cut = panel_rows(rows, 100, 100 * 200, multiple)
    assert 0 < cut <= rows and (cut == rows or cut % multiple == 0)
    if multiple and rows > multiple:
        assert cut <= max(200, multiple)


def test_plans_count_what_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(**SMALL | {"hidden_size": 256, "intermediate_size": 640})
    model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(model)
    put_into_four_bits(model)
    monkeypatch.setitem(SHAPE_RULES, "cpu", replace(SHAPE_RULES["cpu"], weight_panel_bytes=PANEL))
    batches, rules = MicroBatches(8, 8, 8, 1, 0, 0, 0), SHAPE_RULES["cpu"]
    run = RunShape(shape, batches, 0, 3, 4, QuantSpec(), "blocks", "nothing", rules)
    planned = sum(written_out_bytes(run).values())
    weights = DenseWeights()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            for _ in weights.panels(module, torch.float32):
                pass
    assert sum(buffer.nbytes for buffer in weights.rooms.kept.values()) == planned
    assert planned < sum(written_out_bytes(replace(run, path="generic")).values())
