"""Adapters that begin with what quantisation lost: nearer to the 16-bit model, whole in PEFT, and right to merge."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from nybble.errors import ModelError, RunError
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.layers.convert import adapters_of, attach_adapters, quantizable_linears
from nybble.layers.lora import LoraLinear
from nybble.quantization.adapter_init import initialise_adapters
from nybble.runs.adapter_files import INITIAL_NAME, read_adapter, restore_adapter
from nybble.runs.adapter_writing import adapter_config, write_adapter
from nybble.sources.load import load_model
from nybble.sources.open import open_model

FORMATS = BaseFormats(QuantSpec("nf2"))
INITS = ("loftq", "activation")


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(160, (24, 16), generator=torch.Generator().manual_seed(4))


def started(folder: Path, init: str, windows: Tensor, **options: int) -> nn.Module:
    source = open_model(str(folder))
    model = load_model(source, FORMATS, torch.float32)
    attach_adapters(model, quantizable_linears(model), rank=8, alpha=16.0)
    if init != "default":
        initialise_adapters(model, source, windows if init == "activation" else None, **options)
    return model


def delta(adapter: LoraLinear) -> Tensor:
    """What is added to the quantised base's weight."""
    return adapter.scaling * (adapter.lora_B @ adapter.lora_A)


def delta_of_training(adapter: LoraLinear) -> Tensor:
    """What is added to the 16-bit weight: without the correction of the quantised one that the adapter began with."""
    a, b = adapter.initial or (adapter.lora_A * 0, adapter.lora_B * 0)
    return adapter.scaling * (adapter.lora_B @ adapter.lora_A - b @ a)


def states(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def test_the_model_begins_nearer_to_the_16_bit_one(make_folder: Callable, tokens: Tensor, windows: Tensor) -> None:
    for family in ("llama", "gpt2"):
        folder, exact = make_folder(family)
        far = {
            init: float((states(started(folder, init, windows), tokens) - states(exact, tokens)).norm())
            for init in ("default", *INITS)
        }
        assert far["loftq"] < far["default"] and far["activation"] < far["default"], far


def test_each_layer_loses_less_of_its_output(make_folder: Callable, windows: Tensor) -> None:
    """On inputs of the same kind, layer by layer, in the order of what each init knows."""
    folder, exact = make_folder("llama")
    name = "model.layers.0.self_attn.q_proj"  # its input is the same in all of these models
    inputs: list[Tensor] = []
    handle = exact.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    states(exact, torch.randint(160, (16, 16), generator=torch.Generator().manual_seed(9)))
    handle.remove()
    weight = exact.get_submodule(name).weight.detach()

    def lost(init: str) -> float:
        adapter = adapters_of(started(folder, init, windows))[name]
        return float((inputs[0] @ (weight - adapter.base.dequantize() - delta(adapter).detach()).T).norm())

    assert lost("activation") < lost("loftq") < lost("default")


@pytest.mark.parametrize("init", INITS)
def test_peft_reads_the_whole_adapter_on_the_quantised_base(
    make_folder: Callable, tmp_path: Path, tokens: Tensor, windows: Tensor, init: str
) -> None:
    folder, base = make_folder("llama", torch.bfloat16)  # what stays dense is then the same in both
    base.float()
    model = started(folder, init, windows)
    write_adapter(model, tmp_path, adapter_config(model, "base"))
    for name, adapter in adapters_of(model).items():  # PEFT knows no nf2: the same numbers, dense
        base.get_submodule(name).weight.data = adapter.base.dequantize(torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(states(theirs, tokens), states(model, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", INITS)
def test_what_training_added_is_right_for_the_16_bit_base(
    make_folder: Callable, tmp_path: Path, windows: Tensor, init: str
) -> None:
    folder, _ = make_folder("llama")
    model = started(folder, init, windows)
    begun = {name: delta(adapter).detach() for name, adapter in adapters_of(model).items()}
    assert all(not delta_of_training(adapter).any() for adapter in adapters_of(model).values())
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            adapter.lora_A.add_(torch.randn_like(adapter.lora_A))
            adapter.lora_B.add_(torch.randn_like(adapter.lora_B))
    write_adapter(model, tmp_path, adapter_config(model, "base"))

    again = load_model(open_model(str(folder)), FORMATS, torch.float32)
    for read in (read_adapter(again, tmp_path), restored(started(folder, "default", windows), tmp_path)):
        for name, adapter in read.items():
            assert torch.equal(delta(adapter), delta(adapters_of(model)[name]))
            expected = delta(adapter) - begun[name]
            assert (delta_of_training(adapter) - expected).norm() < 1e-5 * expected.norm()


def restored(model: nn.Module, folder: Path) -> dict:
    restore_adapter(model, folder)
    return adapters_of(model)


def test_an_adapter_that_began_with_nothing_has_no_third_file(
    make_folder: Callable, tmp_path: Path, windows: Tensor
) -> None:
    folder, _ = make_folder("llama")
    model = started(folder, "default", windows)
    write_adapter(model, tmp_path, adapter_config(model, "base"))
    assert not (tmp_path / INITIAL_NAME).exists()
    for adapter in adapters_of(model).values():
        adapter.lora_B.data.normal_()
        assert torch.equal(delta_of_training(adapter), delta(adapter))


def test_a_damaged_third_file_is_named(make_folder: Callable, tmp_path: Path, windows: Tensor) -> None:
    folder, _ = make_folder("llama")
    model = started(folder, "loftq", windows)
    write_adapter(model, tmp_path, adapter_config(model, "base"))
    (tmp_path / INITIAL_NAME).write_bytes(b"damaged")
    with pytest.raises(RunError, match=INITIAL_NAME):
        restore_adapter(copy.deepcopy(model), tmp_path)


def test_statistics_of_some_layers_at_a_time_give_the_same(make_folder: Callable, windows: Tensor) -> None:
    """The first block's q, k and v get the same inputs; later layers see the earlier ones begun, and begin too."""
    folder, _ = make_folder("llama")
    whole = adapters_of(started(folder, "activation", windows))
    one_by_one = adapters_of(started(folder, "activation", windows, statistics_bytes=1))
    for number, (name, adapter) in enumerate(one_by_one.items()):
        assert adapter.initial is not None
        assert torch.equal(delta(adapter), delta(whole[name])) == (number < 3), name


def test_a_base_without_an_error_is_refused(make_folder: Callable, windows: Tensor) -> None:
    source = open_model(str(make_folder("llama")[0]))
    model = load_model(source, None, torch.float32)
    attach_adapters(model, quantizable_linears(model), rank=2, alpha=2.0)
    with pytest.raises(ModelError, match="--init default"):
        initialise_adapters(model, source, None)
