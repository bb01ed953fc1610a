"""Checkpoints under other names than the model's: loaded as transformers loads them, or refused by name."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from nybble.errors import FormatError, ModelError
from nybble.files.manifest import MANIFEST_NAME
from nybble.formats.quant_spec import BaseFormats
from nybble.layers.convert import quantizable_linears
from nybble.quantization.folder import quantize_folder, save_dense_folder
from nybble.sources.load import load_model
from nybble.sources.open import open_model

TEXT = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
QWEN = {
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}


def gemma3() -> torch.nn.Module:
    text = TEXT | {"head_dim": 8, "sliding_window": 16}
    vision = VISION | {"image_size": 28, "patch_size": 14}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def qwen3_5() -> torch.nn.Module:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=TEXT | QWEN, vision_config=vision))


def llava() -> torch.nn.Module:
    vision = VISION | {"image_size": 28, "patch_size": 14, "model_type": "clip_vision_model"}
    text = TEXT | {"model_type": "llama"}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))


def loaded(folder: Path) -> torch.nn.Module:
    return load_model(open_model(str(folder)), None, torch.float32)


def renamed(folder: Path, change: Callable[[str], str]) -> None:
    tensors = {change(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same_logits(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs.eval()(ids).logits, rtol=1e-5, atol=1e-5)


def bf16(model: torch.nn.Module) -> torch.nn.Module:
    """Seeded weights that survive being kept in 16 bits."""
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
        parameter.data = parameter.data.bfloat16().float()
    return model


@pytest.mark.parametrize("make", [gemma3, qwen3_5, llava])
def test_the_text_of_a_vision_language_model_gives_its_logits(tmp_path: Path, make: Callable) -> None:
    torch.manual_seed(0)
    whole = bf16(make())
    whole.save_pretrained(tmp_path)
    source = open_model(str(tmp_path))
    source.dense_dtype = torch.float32
    ours = load_model(source, None, torch.float32)
    assert_same_logits(ours, whole)
    assert not any("vis" in name for name in quantizable_linears(ours))
    note, *fit = source.notes
    assert bool(fit) == (make is not qwen3_5)  # which AutoModelForCausalLM takes the text of
    used = set(dict(ours.named_parameters()).values())
    left_out = 4 * sum(p.numel() for p in whole.parameters()) - 4 * sum(p.numel() for p in used)
    said = [float(number) for number in re.findall(r"([\d.]+) MB", note)]
    assert "left out" in note and "vis" in note
    assert sum(said) == pytest.approx(left_out / 1e6, abs=0.05 * len(said) + 1e-6)


def test_experts_stored_one_by_one_become_transformers_parameters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(**TEXT, num_local_experts=3, tie_word_embeddings=False)
    model = bf16(AutoModelForCausalLM.from_config(config))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in stored  # transformers writes them so
    source = open_model(str(tmp_path))
    assert source.matrix("model.layers.0.mlp.experts.gate_up_proj") is None, "a converter makes it"
    assert source.matrix("model.embed_tokens.weight") is not None
    assert_same_logits(loaded(tmp_path), model)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "base_model.model.", "module._orig_mod."])
@pytest.mark.parametrize("tied", [True, False])
def test_a_wrappers_prefix_is_taken_off_and_said(make_folder, prefix: str, tied: bool) -> None:
    folder, model = make_folder("llama", torch.bfloat16, tie_word_embeddings=tied)
    renamed(folder, lambda name: prefix + name)
    source = open_model(str(folder))
    assert_same_logits(load_model(source, None, torch.float32), model.float())
    assert f"begin with '{prefix.partition('.')[0]}." in " ".join(source.notes)


def test_a_text_model_inside_the_old_language_model_prefix(tmp_path: Path) -> None:
    """Older releases of transformers nested it the other way round."""
    torch.manual_seed(0)
    whole = bf16(llava())
    whole.save_pretrained(tmp_path)

    def older(name: str) -> str:
        name = name.replace("model.language_model.", "language_model.model.")
        return name.replace("lm_head", "language_model.lm_head").removeprefix("model.")

    renamed(tmp_path, lambda name: name if name.startswith("language_model.") else older(name))
    assert any(name.startswith("language_model.model.") for name in load_file(tmp_path / "model.safetensors"))
    assert_same_logits(loaded(tmp_path), whole)


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    config = MixtralConfig(**TEXT, num_local_experts=3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts"):
        loaded(tmp_path)


def test_an_absent_head_is_named_with_what_to_set(make_folder) -> None:
    folder, _ = make_folder("llama", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not stored: lm_head\.weight") as refused:
        loaded(folder)
    assert "tie_word_embeddings" in refused.value.fix


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
def test_codes_without_their_scales_are_never_widened(make_folder, dtype: torch.dtype) -> None:
    folder, _ = make_folder("llama")
    tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"layers\.1\.self_attn\.q_proj"):
        open_model(str(folder))


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "compressed-tensors", "mxfp4"])
def test_other_quantisation_is_refused_by_name(make_folder, method: str) -> None:
    folder, _ = make_folder("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(FormatError, match=method):
        open_model(str(folder))


@pytest.mark.parametrize("make", [gemma3, qwen3_5, llava])
def test_the_text_written_alone_is_a_model_to_transformers(tmp_path: Path, make: Callable) -> None:
    torch.manual_seed(0)
    whole = bf16(make())
    whole.save_pretrained(tmp_path / "whole")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(160)}, unk_token="w2"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", unk_token="w2").save_pretrained(tmp_path / "whole")
    save_dense_folder(open_model(str(tmp_path / "whole")), tmp_path / "text")
    text, info = AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_logits(text.eval(), whole)


def test_four_bit_tensors_under_a_prefix_keep_their_bits(make_folder, tmp_path: Path) -> None:
    folder, _ = make_folder("llama")
    quantize_folder(open_model(str(folder)), BaseFormats(), tmp_path / "four")
    expected = loaded(tmp_path / "four")
    (tmp_path / "four" / MANIFEST_NAME).unlink()
    renamed(tmp_path / "four", lambda name: f"module.{name}")
    source = open_model(str(tmp_path / "four"))
    entries = source.stored("model.layers.0.mlp.up_proj.weight")[1]
    assert all(name.startswith("module.model.layers.0.mlp.up_proj.weight") for name in entries)
    assert_same_logits(loaded(tmp_path / "four"), expected)


def test_a_head_that_the_larger_model_ties_is_the_embedding_whatever_its_text_part_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = llava()
    whole = bf16(type(whole)(type(whole.config)(**whole.config.to_dict() | {"tie_word_embeddings": True})))
    whole.save_pretrained(tmp_path)
    assert not any(name.endswith("lm_head.weight") for name in load_file(tmp_path / "model.safetensors"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_logits(loaded(tmp_path), whole)
