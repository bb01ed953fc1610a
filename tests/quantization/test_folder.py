"""Four-bit folders: ours in transformers with bitsandbytes, theirs in ours, and what an interrupted one leaves."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from family_models import CONFIGS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from typed import typed

from nybble.errors import FormatError, ModelError
from nybble.events import Event, Progress
from nybble.formats.blockwise import block_scales
from nybble.formats.bnb import OWN_MODEL_TYPE
from nybble.formats.format import FORMATS
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.planning.from_config import read_config
from nybble.quantization import folder as folder_module
from nybble.quantization.folder import CalibrationInput, quantize_folder
from nybble.quantization.synth import synthesize
from nybble.sources.load import load_model
from nybble.sources.open import open_model
from nybble.sources.shapes import SHAPES

SPECS = [
    QuantSpec("nf4", 64, True),
    QuantSpec("nf4", 64, False),
    QuantSpec("fp4", 64, True),
    QuantSpec("nf4", 128, True),
]


def load_with_bitsandbytes(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()


def dense_weights_of_theirs(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Their weights dequantised by bitsandbytes, rounded to `dtype`: by itself it rounds to the one it recorded."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = copy.copy(module.weight.quant_state)
            state.dtype = dtype
            weights[name] = bnb.functional.dequantize_4bit(module.weight.data, state)
    return weights


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        expected = dense_weights_of_theirs(theirs, dtype)
        assert len(expected) == 14
        for name, weight in expected.items():
            module = ours.get_submodule(name)
            assert isinstance(module, QuantizedLinear)
            assert weight.dtype == dtype
            assert torch.equal(module.dequantize(dtype), weight), name
            assert module.source_dtype == theirs.get_submodule(name).weight.quant_state.dtype


def reference_logits(theirs: nn.Module, tokens: Tensor) -> Tensor:
    """Their model's logits on its own dequantised weights in fp32.

    bitsandbytes' fused CPU kernel multiplies in bf16 on machines that have it: its own error is 1e-2.
    """
    for name, weight in dense_weights_of_theirs(theirs, torch.float32).items():
        old = theirs.get_submodule(name)
        linear = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
        linear.weight.data = weight
        if old.bias is not None:
            linear.bias.data = old.bias.data.float()
        theirs.set_submodule(name, linear)
    nn.Module.float(theirs)  # a quantised model refuses its own; nothing quantised is left in this one
    with torch.no_grad():
        return theirs(tokens).logits


def our_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def quantize(folder: Path, out: Path, spec: QuantSpec = SPECS[0], **options: object) -> Path:
    quantize_folder(open_model(str(folder)), BaseFormats(spec), out, **options)
    return out


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.format}-{spec.block_size}-{spec.double_quant}")
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("qwen2", True)])
def test_our_folder_in_transformers(
    make_folder: Callable, tmp_path: Path, tokens: Tensor, spec: QuantSpec, family: str, tied: bool
) -> None:
    # rows hold whole blocks: bitsandbytes' CPU kernels get others wrong
    width = {"hidden_size": 128, "intermediate_size": 256} if spec.block_size == 128 else {}
    folder, _ = make_folder(family, torch.bfloat16, tie_word_embeddings=tied, **width)
    out = quantize(folder, tmp_path / "out", spec)
    ours = load_model(open_model(str(out)), BaseFormats(), torch.float32)  # whatever is asked, its own bits are kept
    theirs = load_with_bitsandbytes(out)
    assert type(theirs.lm_head) is nn.Linear
    assert_same_weights(ours, theirs)
    exact = our_logits(ours, tokens)
    with torch.no_grad():
        native = load_with_bitsandbytes(out)(tokens).logits  # it repacks its weights: they are garbage afterwards
    assert (native - exact).norm() < 0.02 * exact.norm()  # bf16 keeps 8 bits
    torch.testing.assert_close(reference_logits(theirs, tokens), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rounding", ["search", "calibrated"])
def test_better_bits_are_bitsandbytes_bytes(
    make_folder: Callable, tmp_path: Path, tokens: Tensor, rounding: str
) -> None:
    """Negative scales and chosen levels load there as they do here."""
    folder, _ = make_folder("llama", torch.bfloat16)
    out = quantize(folder, tmp_path / "out", rounding=rounding, calibration=calibration())
    ours = load_model(open_model(str(out)), BaseFormats(), torch.float32)
    scales = torch.cat([block_scales(m.quantized()) for m in ours.modules() if isinstance(m, QuantizedLinear)])
    assert (scales < 0).any() and (scales > 0).any()
    theirs = load_with_bitsandbytes(out)
    assert_same_weights(ours, theirs)
    torch.testing.assert_close(reference_logits(theirs, tokens), our_logits(ours, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("format", [format.name for format in FORMATS.values() if format.bitsandbytes])
@pytest.mark.parametrize("tied", [True, False])
def test_their_folder_in_ours(
    make_folder: Callable, tmp_path: Path, tokens: Tensor, format: str, double_quant: bool, tied: bool
) -> None:
    folder, _ = make_folder("llama", torch.bfloat16, tie_word_embeddings=tied)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=format,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    theirs = load_with_bitsandbytes(tmp_path / "theirs")
    source = open_model(str(tmp_path / "theirs"))
    assert source.quant_spec == QuantSpec(format, 64, double_quant)
    assert "already quantised" in source.notes[0]
    ours = load_model(source, BaseFormats(), torch.float32)
    assert_same_weights(ours, theirs)
    torch.testing.assert_close(reference_logits(theirs, tokens), our_logits(ours, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_folder_comes_back_bit_for_bit(
    make_folder: Callable, tmp_path: Path, tokens: Tensor, format: str, family: str
) -> None:
    folder, _ = make_folder(family, torch.bfloat16)
    spec = QuantSpec(format, 32, True)
    direct = load_model(open_model(str(folder)), BaseFormats(spec), torch.float32)
    out = quantize(folder, tmp_path / "out", spec)
    source = open_model(str(out))
    assert source.quant_spec == spec
    again = load_model(source, BaseFormats(spec), torch.float32)
    assert again.state_dict().keys() == direct.state_dict().keys()
    for name, tensor in direct.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(our_logits(again, tokens), our_logits(direct, tokens))

    dense = load_model(source, None, torch.float32)  # from four bits to dense: the same numbers
    torch.testing.assert_close(our_logits(dense, tokens), our_logits(again, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rounding", ["search", "calibrated"])
def test_a_full_disk_is_a_message_and_leaves_nothing_that_looks_complete(
    tiny_model: Path, tmp_path: Path, disk: Any, rounding: str
) -> None:
    """The system refuses to let any file grow beyond a limit: in the blocks, in the folder, in the tokenizer."""
    arguments = ["quantize", "--model", str(tiny_model), "--quality", rounding, "--calibration-tokens", "512"]
    for limit in (300, 10_000, 100_000):
        with disk.largest_file(limit):
            done = typed([*arguments, "--out", tmp_path / f"out-{limit}"])
        message = " ".join(done.stderr.split())
        assert isinstance(done.exception, SystemExit), repr(done.exception)
        assert done.exit_code == 2 and "cannot be written: " in message, message
        assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".partial")]


OWN_FORMATS = [format.name for format in FORMATS.values() if not format.bitsandbytes]
WITHOUT_NYBBLE = """
import sys
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

for folder in sys.argv[1:]:
    for options in ({}, {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}):
        try:
            AutoModelForCausalLM.from_pretrained(folder, **options)
        except ValueError as error:
            print("a format that only nybble loads" in str(error))
"""


def test_transformers_refuses_what_only_nybble_reads(make_folder: Callable, tmp_path: Path) -> None:
    """And names nybble; it would otherwise only warn of the quant_method, and fail on the shapes. In a process of its
    own: once `nybble.hf` is imported, these folders open."""
    folder = make_folder("llama", torch.bfloat16)[0]
    outs = [str(quantize(folder, tmp_path / format, QuantSpec(format))) for format in OWN_FORMATS]
    done = subprocess.run([sys.executable, "-c", WITHOUT_NYBBLE, *outs], capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 2 * len(outs), done.stdout + done.stderr


@pytest.mark.parametrize("format", OWN_FORMATS)
def test_a_folder_of_nybble_s_own_opens(make_folder: Callable, tmp_path: Path, format: str) -> None:
    out = quantize(make_folder("llama", torch.bfloat16)[0], tmp_path / "out", QuantSpec(format))
    assert AutoTokenizer.from_pretrained(out)("w5").input_ids == [5]
    source = open_model(str(out))
    assert source.config.model_type == "llama" and read_config(str(out))["model_type"] == "llama"
    assert source.quant_spec == QuantSpec(format)


def test_a_folder_of_nybble_s_own_without_its_model_type_is_refused(make_folder: Callable) -> None:
    folder, _ = make_folder()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": OWN_MODEL_TYPE, "quantization_config": {}}))
    with pytest.raises(ModelError, match="has no model_type"):
        open_model(str(folder))


def test_what_the_folder_holds(make_folder: Callable, tmp_path: Path) -> None:
    folder, _ = make_folder("llama", torch.float16)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    seen: list[Event] = []
    out = quantize(folder, tmp_path / "out", report=seen.append, max_shard_bytes=30_000)
    assert seen == [Progress("quantizing", done, 2) for done in range(3)]
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]
    assert AutoTokenizer.from_pretrained(out)("w5").input_ids == [5]
    assert GenerationConfig.from_pretrained(out).eos_token_id == [1, 7]
    assert (out / "model.safetensors.index.json").is_file()
    source = open_model(str(out))
    dense = [name for name in source.tensor_names() if not source.is_quantized(name)]
    assert {source.read(name).dtype for name in dense} == {torch.float16}


def test_vectors_keep_their_precision(make_folder: Callable, tmp_path: Path) -> None:
    folder, model = make_folder("llama", torch.float32)
    source = open_model(str(quantize(folder, tmp_path / "out")))
    assert torch.equal(source.read("model.norm.weight"), model.model.norm.weight)
    assert source.read("model.embed_tokens.weight").dtype == torch.bfloat16


def test_twice_is_refused(make_folder: Callable, tmp_path: Path) -> None:
    folder, _ = make_folder()
    out = quantize(folder, tmp_path / "out")
    with pytest.raises(ModelError, match="already quantised"):
        quantize(out, tmp_path / "twice")


def test_a_folder_in_use_is_refused_and_kept(make_folder: Callable, tmp_path: Path) -> None:
    folder, _ = make_folder()
    before = sorted(folder.iterdir())
    with pytest.raises(ModelError, match="not empty"):
        quantize(folder, folder)
    assert sorted(folder.iterdir()) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def interrupt_after(count: int) -> Callable:
    def report(event: Event) -> None:
        if isinstance(event, Progress) and event.done == count:
            raise KeyboardInterrupt

    return report


def calibration(seed: int = 0) -> CalibrationInput:
    windows = torch.randint(160, (4, 32), generator=torch.Generator().manual_seed(seed))
    return CalibrationInput(windows, torch.float32)


@pytest.mark.parametrize("keep_states", [True, False])
@pytest.mark.parametrize("rounding", ["absmax", "search", "calibrated"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    make_folder: Callable, tmp_path: Path, monkeypatch, family: str, rounding: str, keep_states: bool
) -> None:
    folder, _ = make_folder(family, torch.bfloat16)
    options = {"rounding": rounding, "calibration": calibration()}
    whole = quantize(folder, tmp_path / "whole", **options)
    monkeypatch.setattr(folder_module, "STATES_EVERY_S", -1.0 if keep_states else 1e9)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, out, report=interrupt_after(1), **options)
    assert not out.exists()
    seen: list[Event] = []
    quantize(folder, out, report=seen.append, **options)
    redone = 2 if rounding != "calibrated" or not keep_states else 1  # what is listed; finished blocks are skipped
    assert seen[0] == Progress("quantizing", 0, redone)
    assert contents(out) == contents(whole)
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, "whole", "out"}


def test_a_damaged_block_is_made_again_and_other_work_discarded(make_folder: Callable, tmp_path: Path) -> None:
    folder, _ = make_folder()
    whole = quantize(folder, tmp_path / "whole", rounding="search")
    for damage in (b"", b"x" * 100, None):
        with pytest.raises(KeyboardInterrupt):
            quantize(
                folder, tmp_path / "out", report=interrupt_after(1), rounding="absmax" if damage is None else "search"
            )
        if damage is not None:
            (tmp_path / "out.partial" / "block-00000.safetensors").write_bytes(damage)
    assert contents(quantize(folder, tmp_path / "out", rounding="search")) == contents(whole)


def test_an_unwritable_output_says_so(make_folder: Callable, tmp_path: Path) -> None:
    folder, _ = make_folder()
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be written: Not a directory"):
        quantize(folder, tmp_path / "file" / "out")


def test_a_changed_file_of_our_own_folder_is_refused_and_a_folder_without_a_manifest_is_not(make_folder, tmp_path):
    folder, _ = make_folder()
    out = tmp_path / "four-bit"
    quantize_folder(open_model(str(folder)), BaseFormats(), out)
    open_model(str(out))
    config = (out / "config.json").read_bytes()
    (out / "config.json").write_bytes(config + b" ")
    with pytest.raises(FormatError, match=r"(?s)config\.json has \d+ bytes.*remove the manifest"):
        open_model(str(out))
    (out / "nybble-manifest.json").unlink()
    open_model(str(out))


def test_a_synthetic_model_has_the_buffers_that_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4's factors of what a layer gives."""
    monkeypatch.setitem(SHAPES, "small", CONFIGS["gemma4_text"].to_dict() | {"vocab_size": 300})
    synthesize("small", QuantSpec(), tmp_path / "model")
    model = load_model(open_model(str(tmp_path / "model")), BaseFormats(), torch.float32)
    factors = [buffer for name, buffer in model.named_buffers() if name.endswith("layer_scalar")]
    assert len(factors) == 4 and all(factor == 1 for factor in factors)
