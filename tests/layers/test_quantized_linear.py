"""QuantizedLinear and LoraLinear against autograd on the dequantised dense weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nybble.formats.format import FORMATS
from nybble.formats.quant_spec import QuantSpec
from nybble.kernels.ops.four_bit import quantize
from nybble.layers.lora import LoraLinear, lora_scaling
from nybble.layers.quantized_linear import QuantizedLinear

SHAPES = [(192, 128), (70, 96), (33, 64), (5, 7), (1, 1)]  # (in, out); some with in % 64 != 0, one odd count


def quantized_linear(in_features: int, out_features: int, spec: QuantSpec, bias: bool = False) -> QuantizedLinear:
    weight = torch.randn(out_features, in_features)
    layer = QuantizedLinear(in_features, out_features, bias, spec, torch.float32)
    layer.load_quantized(quantize(weight, spec))
    if bias:
        layer.bias.data.copy_(torch.randn(out_features))
    return layer


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_forward_and_backward_equal_the_dense_layer(in_features, out_features, format):
    torch.manual_seed(0)
    layer = quantized_linear(in_features, out_features, QuantSpec(format), bias=True)
    x = torch.randn(2, 3, in_features, requires_grad=True)
    dense_x = x.detach().clone().requires_grad_()
    y = layer(x)
    dense_y = F.linear(dense_x, layer.dequantize(), layer.bias)
    grad = torch.randn_like(y)
    y.backward(grad)
    dense_y.backward(grad)
    torch.testing.assert_close(y, dense_y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, dense_x.grad, rtol=1e-6, atol=1e-6)
    assert layer.packed.grad is None and layer.scales.grad is None


def test_layers_take_turns_in_one_room() -> None:
    """The first product in inference mode, where tensors are of a kind of their own; then two sizes, each twice."""
    torch.manual_seed(0)
    layers = [quantized_linear(64, 96, QuantSpec()), quantized_linear(96, 64, QuantSpec())]
    x = torch.randn(3, 64, requires_grad=True)
    with torch.inference_mode():
        layers[0](x)
    y = layers[1](layers[0](layers[1](layers[0](x))))
    dense = [layer.dequantize() for layer in layers]
    both = dense[0].T @ dense[1].T
    torch.testing.assert_close(y, x @ both @ both, rtol=1e-4, atol=1e-3)
    (found,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(found, (both @ both).sum(1).expand(3, 64), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES[:3])
def test_lora_gradients_equal_autograd_on_the_sum_of_dense_weights(in_features, out_features, rslora):
    torch.manual_seed(1)
    base = quantized_linear(in_features, out_features, QuantSpec())
    lora = LoraLinear(base, rank=4, alpha=12.0, rslora=rslora)
    nn.init.normal_(lora.lora_B)
    x = torch.randn(5, in_features, requires_grad=True)
    grad = torch.randn(5, out_features)
    lora(x).backward(grad)

    a, b = (p.detach().double().requires_grad_() for p in (lora.lora_A, lora.lora_B))
    dense_x = x.detach().double().requires_grad_()
    weight = base.dequantize().double() + lora_scaling(12.0, 4, rslora) * (b @ a)
    F.linear(dense_x, weight).backward(grad.double())
    for got, expected in ((x.grad, dense_x.grad), (lora.lora_A.grad, a.grad), (lora.lora_B.grad, b.grad)):
        assert (got.double() - expected).norm() <= 1e-5 * expected.norm()


def test_an_untrained_adapter_changes_nothing_and_can_be_switched_off():
    torch.manual_seed(2)
    base = quantized_linear(64, 32, QuantSpec())
    lora = LoraLinear(base, rank=2, alpha=4.0)
    x = torch.randn(3, 64)
    assert torch.equal(lora(x), base(x))
    nn.init.normal_(lora.lora_B)
    assert not torch.equal(lora(x), base(x))
    lora.enabled = False
    assert torch.equal(lora(x), base(x))


def test_dropout_acts_only_while_training_and_only_on_the_adapter():
    torch.manual_seed(3)
    lora = LoraLinear(quantized_linear(64, 32, QuantSpec()), rank=2, alpha=4.0, dropout=0.5)
    nn.init.normal_(lora.lora_B)
    x = torch.randn(3, 64)
    lora.train()
    assert not torch.equal(lora(x), lora(x))
    lora.eval()
    assert torch.equal(lora(x), lora(x))


def test_two_frozen_uint8_parameters_that_deepcopy_and_state_dict_carry():
    layer = quantized_linear(64, 16, QuantSpec())
    assert {name: (p.dtype, p.requires_grad) for name, p in layer.named_parameters()} == {
        "packed": (torch.uint8, False),
        "scales": (torch.uint8, False),
    }
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.dequantize(), layer.dequantize())
    other = QuantizedLinear(64, 16, False, QuantSpec(), torch.float32)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dequantize(), layer.dequantize())


def test_train_eval_train_gives_the_same_gradients_bit_for_bit():
    torch.manual_seed(4)
    layer = quantized_linear(128, 64, QuantSpec())
    x = torch.randn(7, 128)

    def gradient() -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        return leaf.grad

    layer.train()
    first = gradient()
    layer.eval()
    with torch.no_grad():
        layer(x)
    layer.train()
    assert torch.equal(first, gradient())
