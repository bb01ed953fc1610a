"""Predicted losses of layers against what quantising them does, and mixed folders there and back."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nybble.errors import ConfigError, FormatError
from nybble.formats.bnb import formats_from_config
from nybble.formats.format import FORMATS
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.kernels.ops.four_bit import dequantize, quantize
from nybble.layers.convert import quantizable_linears
from nybble.quantization.folder import CalibrationInput, quantize_folder
from nybble.quantization.sensitivity import allocate_bits, layer_losses
from nybble.sources.load import load_model
from nybble.sources.open import open_model

MIXABLE = [format.name for format in FORMATS.values() if format.mixable]
SPECS = [QuantSpec(format) for format in MIXABLE]


def measured_kl(model: nn.Module, windows: Tensor, layer: str, spec: QuantSpec) -> float:
    """The divergence in nats a token when this layer alone is quantised."""
    linear = model.get_submodule(layer)
    with torch.no_grad():
        before = model(windows).logits.log_softmax(-1)
        kept = linear.weight.data
        linear.weight.data = dequantize(quantize(kept, spec), kept.dtype)
        after = model(windows).logits.log_softmax(-1)
        linear.weight.data = kept
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.fixture
def dense(make_folder: Callable) -> nn.Module:
    """Weights of a size at which layers matter unequally."""
    folder, _ = make_folder("llama", initializer_range=0.2)
    return load_model(open_model(str(folder)), None, torch.float32)


def test_predicted_losses_are_near_the_measured_ones(dense: nn.Module) -> None:
    windows = torch.randint(160, (64, 16), generator=torch.Generator().manual_seed(2))
    predicted = layer_losses(dense, windows, SPECS[:2])
    assert list(predicted) == quantizable_linears(dense)
    ratios = []
    for layer, losses in predicted.items():
        assert losses["nf3"] > losses["nf4"] > 0
        ratios.append(losses["nf4"] / measured_kl(dense, windows, layer, SPECS[0]))
    assert all(1 / 3 < ratio < 3 for ratio in ratios), ratios
    logs = torch.tensor([[predicted[n]["nf4"], measured_kl(dense, windows, n, SPECS[0])] for n in predicted]).log()
    assert float(torch.corrcoef(logs.T)[0, 1]) > 0.9


def test_the_choice_keeps_to_the_bits_and_beats_one_format_for_all(dense: nn.Module) -> None:
    windows = torch.randint(160, (16, 16), generator=torch.Generator().manual_seed(2))
    uniform = 3 + 8 / 64 + 0.1  # tiny matrices: the second level of scales weighs more than in real ones
    chosen = allocate_bits(dense, windows, uniform, QuantSpec())
    assert chosen.bits <= uniform and chosen.formats.layers.keys() == set(quantizable_linears(dense))
    assert set(chosen.formats.names) <= set(MIXABLE)
    assert chosen.predicted_kl < sum(losses["nf3"] for losses in chosen.losses.values())
    assert allocate_bits(dense, windows, 4.9, QuantSpec()).formats.names == ["nf4"]
    with pytest.raises(ConfigError, match=r"all nf2\) to"):
        allocate_bits(dense, windows, 2.01, QuantSpec())


def test_measuring_leaves_the_model_as_it_was(dense: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    layer_losses(dense, torch.randint(160, (2, 16)), SPECS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert not any(module._forward_hooks for module in dense.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in dense.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rounding", ["absmax", "search"])
def test_a_mixed_folder_comes_back_bit_for_bit(
    make_folder: Callable, tmp_path: Path, tokens: Tensor, rounding: str, family: str
) -> None:
    folder, _ = make_folder(family, torch.bfloat16)
    source = open_model(str(folder))
    names = quantizable_linears(load_model(source, None, torch.float32))
    formats = BaseFormats(QuantSpec(), {name: MIXABLE[number % 3] for number, name in enumerate(names)})
    quantize_folder(source, formats, tmp_path / "out", rounding=rounding)

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "nybble"
    assert config["quantization_config"]["layers"] == formats.layers
    stored = open_model(str(tmp_path / "out"))
    assert "nf2, nf3, nf4" in stored.notes[0]
    again = load_model(stored, BaseFormats(), torch.float32)
    assert all(again.get_submodule(name).spec == formats.of(name) for name in names)
    if rounding == "absmax":
        direct = load_model(source, formats, torch.float32)
        for name, tensor in direct.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
    with torch.no_grad():
        assert again(tokens).logits.isfinite().all()


def test_a_mixed_config_without_layers_is_refused() -> None:
    config = {"quantization_config": {"quant_method": "nybble", "format": "mixed", "double_quant": True}}
    with pytest.raises(FormatError, match="names no layers"):
        formats_from_config(config)


def test_calibrated_mixed_folders_lose_less_than_absmax(make_folder: Callable, tmp_path: Path) -> None:
    folder, exact = make_folder("llama", torch.float32, initializer_range=0.1)
    source = open_model(str(folder))
    names = quantizable_linears(exact)
    formats = BaseFormats(QuantSpec(), {name: MIXABLE[number % 3] for number, name in enumerate(names)})
    windows = torch.randint(160, (16, 32), generator=torch.Generator().manual_seed(6))
    validation = torch.randint(160, (8, 32), generator=torch.Generator().manual_seed(7))
    calibration = CalibrationInput(windows, torch.float32)
    lost = {}
    for rounding in ("absmax", "calibrated"):
        quantize_folder(source, formats, tmp_path / rounding, rounding=rounding, calibration=calibration)
        model = load_model(open_model(str(tmp_path / rounding)), None, torch.float32)
        with torch.no_grad():
            lost[rounding] = float((model(validation).logits - exact(validation).logits).norm())
    assert lost["calibrated"] < 0.9 * lost["absmax"], lost
