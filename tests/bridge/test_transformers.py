"""transformers' own loading and saving of models in nybble's formats, against `nybble quantize`."""

import json
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

import nybble
import nybble.hf
from nybble.bridge import weights
from nybble.calibration.search import round_weight
from nybble.errors import ConfigError, FormatError, ModelError
from nybble.formats.quant_spec import QuantSpec
from nybble.kernels.ops.four_bit import quantize
from nybble.layers.experts_weight import ExpertsWeight
from nybble.layers.few_bit_tensor import FewBitTensor
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.layers.quantized_weight import QuantizedWeight

IDS = torch.arange(12)[None]


def load(folder: Path, **keywords: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **keywords)


def stored(folder: Path) -> dict[str, bytes]:
    """The bytes of each stored tensor."""
    tensors = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: bytes(t.view(-1).view(torch.uint8).tolist()) for each in tensors for name, t in each.items()}


def in_few_bits(model: Any) -> dict[str, bytes]:
    """The bytes of each weight in few bits."""
    parameters = model.named_parameters()
    found = {name.removesuffix(".weight"): each.q for name, each in parameters if isinstance(each, FewBitTensor)}
    found |= {name: each.quantized() for name, each in model.named_modules() if isinstance(each, QuantizedLinear)}
    return {name: bytes(q.packed.flatten().tolist()) + bytes(q.scales.flatten().tolist()) for name, q in found.items()}


@pytest.mark.parametrize("format", ["nf4", "int4_asym"])
def test_loading_saving_and_loading_again_keep_what_nybble_quantize_writes(
    tiny_model: Path, tmp_path: Path, format: str
) -> None:
    model = load(tiny_model, quantization_config=nybble.NybbleConfig(format))
    logits, bytes_of = model(IDS).logits, in_few_bits(model)
    assert len(bytes_of) == 14
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(again(IDS).logits, logits)
    assert stored(tmp_path / "saved") == stored(tmp_path / "again")
    in_hand = nybble.quantize_(load(tiny_model), format)
    assert torch.equal(in_hand(IDS).logits, logits)
    in_hand.save_pretrained(tmp_path / "in_hand")
    assert stored(tmp_path / "in_hand") == stored(tmp_path / "saved")

    nybble.quantize(model=tiny_model, out=tmp_path / "ours", format=format, quality="absmax")
    ours = load(tmp_path / "ours", config=nybble.hf.read_config(tmp_path / "ours"))
    assert in_few_bits(ours) == bytes_of
    ours.save_pretrained(tmp_path / "ours_again")
    again, ours_stored = stored(tmp_path / "ours_again"), stored(tmp_path / "ours")
    few = {name for name in ours_stored if name.partition(".weight")[0] in bytes_of}
    assert len(few) >= 5 * 14 and again.keys() == ours_stored.keys()
    assert {name: again[name] for name in few} == {name: ours_stored[name] for name in few}
    assert in_few_bits(nybble.load(nybble.open_model(tmp_path / "saved")).module) == bytes_of


def test_a_folder_that_only_nybble_reads_is_opened_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    nybble.quantize(model=tiny_model, out=tmp_path / "ours", format="nf3", quality="search", block_size=32)
    model = load(tmp_path / "ours")
    weight = model.model.layers[0].mlp.down_proj.weight
    assert weight.q.spec == QuantSpec("nf3", 32) and type(model).__name__ == "LlamaForCausalLM"
    made = load(tiny_model, quantization_config=nybble.NybbleConfig("nf3", 32, quality="search"))
    assert in_few_bits(made) == in_few_bits(model)


def test_weights_are_frozen_and_what_is_skipped_stays(tiny_model: Path, tmp_path: Path) -> None:
    config = nybble.NybbleConfig(skip_modules=["down_proj", "layers.1.self_attn"])
    model = load(tiny_model, quantization_config=config)
    kinds = {name: isinstance(each, QuantizedWeight) for name, each in model.named_parameters()}
    few = {name for name, is_few in kinds.items() if is_few}
    leaves = [f"layers.{n}.mlp.{leaf}_proj.weight" for n in (0, 1) for leaf in ("gate", "up")]
    leaves += [f"layers.0.self_attn.{leaf}_proj.weight" for leaf in "qkvo"]
    assert few == {f"model.{leaf}" for leaf in leaves}
    assert not any(each.requires_grad for name, each in model.named_parameters() if name in few)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", dtype=torch.bfloat16)
    assert {n for n, each in again.named_parameters() if isinstance(each, QuantizedWeight)} == few
    assert {each.dtype for each in again.parameters()} == {torch.bfloat16}
    assert not any(each.requires_grad for name, each in again.named_parameters() if name in few)


def test_a_gpt2_whose_layers_are_transposed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=2, n_positions=32))
    dense.save_pretrained(tmp_path / "dense")
    expected = quantize(dense.transformer.h[0].mlp.c_fc.weight.detach().T, QuantSpec())
    model = load(tmp_path / "dense", quantization_config=nybble.NybbleConfig())
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight.packed, expected.packed)
    model.save_pretrained(tmp_path / "saved")
    logits = [each(IDS).logits for each in (model, load(tmp_path / "saved"), nybble.quantize_(dense.eval()))]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_experts_go_into_few_bits_too(tiny_mixture: Path, tmp_path: Path) -> None:
    model = load(tiny_mixture, quantization_config=nybble.NybbleConfig())
    assert sum(isinstance(each, ExpertsWeight) for each in model.parameters()) == 4
    logits = model(IDS).logits
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(IDS).logits, logits)
    assert torch.equal(nybble.quantize_(load(tiny_mixture))(IDS).logits, logits)
    nybble.quantize(model=tiny_mixture, out=tmp_path / "ours", quality="absmax")
    assert in_few_bits(load(tmp_path / "ours")) == in_few_bits(model)


def test_one_tensor_is_dense_at_a_time(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def watched(weight: torch.Tensor, spec: QuantSpec, quality: str) -> Any:
        assert not [each for each in seen if each() is not None], "an earlier dense weight is still alive"
        seen.append(weakref.ref(weight))
        return round_weight(weight, spec, quality)

    monkeypatch.setattr(weights, "round_weight", watched)
    model = load(tiny_model, quantization_config=nybble.NybbleConfig())
    few = [each.q for each in model.parameters() if isinstance(each, QuantizedWeight)]
    assert len(seen) == len(few) == 14
    assert sum(q.nbytes for q in few) < 0.6 * sum(q.numel for q in few)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: nybble.NybbleConfig("nf5"), FormatError, "Unknown format 'nf5'"),
        (lambda: nybble.NybbleConfig(block_size=48), FormatError, "Block size 48"),
        (lambda: nybble.NybbleConfig(double_qaunt=False), ConfigError, "Did you mean 'double_quant'"),
        (lambda: nybble.NybbleConfig(quality="calibrated"), ConfigError, "nybble quantize --quality calibrated"),
        (lambda: nybble.NybbleConfig("int4_asym", quality="search"), FormatError, "zero points"),
        (lambda: nybble.NybbleConfig("q4_0", 32, False), FormatError, "never made"),
    ],
)
def test_options_that_cannot_be_are_refused(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_what_does_not_fit_the_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'down_proj'"):
        load(tiny_model, quantization_config=nybble.NybbleConfig(skip_modules=["down_poj"]))
    with pytest.raises(ConfigError, match="No weight of Llama"):
        load(tiny_model, quantization_config=nybble.NybbleConfig(skip_modules=["layers.*"]))
    for device_map in ({"": "disk"}, {"model": "cpu", "lm_head": "disk"}):
        with pytest.raises(ModelError, match="one device for the whole model"):
            load(tiny_model, quantization_config=nybble.NybbleConfig(), device_map=device_map)
    with pytest.raises(ModelError, match="in no format that is kept"):
        nybble.hf.read_config(tiny_model)
    model = nybble.quantize_(load(tiny_model))
    with pytest.raises(ModelError, match="already quantised"):
        nybble.quantize_(model)
    adapted = get_peft_model(load(tiny_model), LoraConfig(r=2, target_modules=["q_proj"]))
    for not_one in (adapted, adapted.base_model.model, torch.nn.Linear(64, 64), str(tiny_model)):
        with pytest.raises(ModelError, match=r"(?s)cannot be put into few bits.*Quantise first"):
            nybble.quantize_(not_one)
    with pytest.raises(ModelError, match="do not come back"):
        model.dequantize()
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"quantized with NybbleConfig.*BitsAndBytesConfig"):
        load(tmp_path / "saved", quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    nybble.quantize(model=tiny_model, out=tmp_path / "bnb", quality="absmax")
    with pytest.raises(ValueError, match=r"quantized with BitsAndBytesConfig.*NybbleConfig"):
        load(tmp_path / "bnb", quantization_config=nybble.NybbleConfig())


def test_a_damaged_folder_says_which_tensor(tiny_model: Path, tmp_path: Path) -> None:
    nybble.quantize_(load(tiny_model)).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    config["quantization_config"]["format"] = "nf7"
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings(), pytest.raises(FormatError, match="nf7"):
        load(tmp_path / "saved")
