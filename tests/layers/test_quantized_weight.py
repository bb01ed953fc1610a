"""A weight in few bits that other libraries take for a matrix: against the dense matrix it stands for."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nybble.errors import ConfigError
from nybble.formats.format import FORMATS
from nybble.formats.quant_spec import QuantSpec
from nybble.kernels.ops.four_bit import dequantize, quantize
from nybble.layers.quantized_weight import QuantizedWeight, frozen_parameter


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(64, 96)
    layer.weight = frozen_parameter(quantize(layer.weight, QuantSpec()), torch.float32)
    return layer


def dense_of(layer: nn.Linear) -> Tensor:
    return dequantize(layer.weight.q, torch.float32)


@pytest.mark.parametrize("format", FORMATS)
def test_a_product_and_its_gradient_are_those_of_the_dense_weight(format: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    layer.weight = frozen_parameter(quantize(layer.weight, QuantSpec(format)), torch.float32)
    x, y = (torch.randn(5, 64, requires_grad=True) for _ in range(2))
    y.data.copy_(x.data)
    layer(x).square().sum().backward()
    F.linear(y, dense_of(layer), layer.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert layer.weight.grad is None and layer.bias.grad is not None


def test_nothing_dense_is_kept_for_the_backward_pass(linear: nn.Linear) -> None:
    kept = []
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        linear(x)
    assert torch.Size([96, 64]) not in kept


def test_it_is_a_frozen_parameter_of_its_logical_shape_and_dtype(linear: nn.Linear) -> None:
    weight = linear.weight
    assert isinstance(weight, nn.Parameter) and not weight.requires_grad and weight.shape == (96, 64)
    assert weight.packed.dtype == torch.uint8 and weight.dtype == torch.float32
    for ask in (lambda: weight.requires_grad_(), lambda: setattr(weight, "requires_grad", True)):
        with pytest.raises(ConfigError, match="asked to learn"):
            ask()
    weight.requires_grad_(False)


def test_other_operations_see_the_dense_weight(linear: nn.Linear) -> None:
    dense = dense_of(linear)
    assert torch.equal(linear.weight.T @ torch.ones(96), dense.T @ torch.ones(96))
    assert torch.equal(torch.linalg.norm(linear.weight + 1, dim=1), torch.linalg.norm(dense + 1, dim=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(torch.randn(2, 64)).dtype == torch.bfloat16


def test_moving_and_copying_keep_the_bytes(linear: nn.Linear) -> None:
    packed = linear.weight.packed.clone()
    twin = copy.deepcopy(linear)
    assert isinstance(twin.weight, nn.Parameter) and twin.weight.packed.data_ptr() != linear.weight.packed.data_ptr()
    linear.bfloat16()
    assert linear.weight.dtype == torch.bfloat16 and linear(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16
    linear.weight.data = linear.weight.data.to(torch.float32)  # PEFT's prepare_model_for_kbit_training
    assert linear.weight.dtype == torch.float32 and torch.equal(linear.weight.packed, packed)
    twin.load_state_dict(linear.state_dict())
    assert torch.equal(twin.weight.packed, packed)


def test_what_is_written_is_rounded_and_said(linear: nn.Linear) -> None:
    dense, delta = dense_of(linear), torch.randn(96, 64) / 50
    expected = quantize(dense + delta, QuantSpec())
    kept = linear.weight.data.clone()
    with pytest.warns(UserWarning, match="rounded to nf4 again"):
        linear.weight.data += delta
    assert torch.equal(linear.weight.packed, expected.packed) and torch.equal(linear.weight.scales, expected.scales)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linear.weight.data = dense + delta
        assert torch.equal(linear.weight.packed, expected.packed)
        linear.weight.data = kept
    assert isinstance(kept, QuantizedWeight) and torch.equal(dense_of(linear), dense)
