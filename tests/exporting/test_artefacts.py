"""What is written, compared with an independent merge, in the libraries that it is written for."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from nybble.exporting.artefact import Artefact, write
from nybble.exporting.gguf_model import read_gguf_adapter
from nybble.exporting.merged_source import MergedSource
from nybble.formats.blockwise import dequantize, quantize
from nybble.formats.gguf import GgufFile
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.layers.convert import quantizable_linears
from nybble.options.use_groups import ArtefactKind, GgufType
from nybble.quantization.folder import quantize_folder
from nybble.runs.adapter_files import StoredAdapter
from nybble.runs.open_run import open_run
from nybble.sources.load import load_model
from nybble.sources.open import open_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
GEMMA4 = {  # as tiny_families has it, and otherwise
    "inputs of layers, keys read by others": {"vocab_size_per_layer_input": 300},
    "values that are keys": {
        "num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True,
        "num_global_key_value_heads": 1, "tie_word_embeddings": False,
    },
}  # fmt: skip
TOKENS = torch.tensor([[70, 5, 33, 90, 12, 200, 41, 7, 8, 9]])


def merged_by_peft(run: Path, dequantized: bool) -> torch.nn.Module:
    """transformers' model with its linears through four bits (plain PyTorch's) or not, and PEFT's own merge."""
    model = AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype=torch.float32)
    if dequantized:
        for name in quantizable_linears(model):
            linear = model.get_submodule(name)
            transposed = type(linear).__name__ == "Conv1D"
            weight = linear.weight.data.to(torch.bfloat16)  # as stored
            q = quantize(weight.T.contiguous() if transposed else weight, QuantSpec())
            dense = dequantize(q, torch.float32)
            linear.weight.data = dense.T.contiguous() if transposed else dense
    return PeftModel.from_pretrained(model, run / "adapter").merge_and_unload().eval()


def logits(model: torch.nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits.float()


def assert_near(ours: Tensor, theirs: Tensor, relative: float) -> None:
    assert (ours - theirs).norm() <= relative * theirs.norm(), float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("onto", ["dequantized", "original"])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_a_16_bit_folder_is_peft_s_own_merge(make_run: Callable, tmp_path: Path, family: str, onto: str) -> None:
    run = make_run(family)
    out = tmp_path / "out"
    write(open_run(run), Artefact(ArtefactKind.DENSE, GgufType.F16, onto), out)
    theirs = merged_by_peft(run, onto == "dequantized")
    ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in theirs.state_dict().items()}
    for name, tensor in ours.state_dict().items():
        steps = (tensor - expected[name].float()).abs() / expected[name].float().abs().clamp(min=1e-6)
        assert float(steps.max()) < 2**-7, name  # at most one rounding apart, where the products' order differs
    assert_near(logits(ours), logits(theirs), 0.02)
    saved = json.loads((out / "config.json").read_text())
    assert saved["dtype"] == "bfloat16" and "quantization_config" not in saved


def test_sharded_folders_have_an_index(make_run: Callable, tmp_path: Path) -> None:
    from nybble.quantization.folder import save_dense_folder

    merged = MergedSource(open_run(make_run()), "dequantized")
    save_dense_folder(merged, tmp_path / "out", max_shard_bytes=60_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    save_dense_folder(merged, tmp_path / "whole")
    halves, whole = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "whole"))
    assert torch.equal(logits(halves), logits(whole))


def test_the_generation_config_ends_answers_as_the_template_does(make_run: Callable, tmp_path: Path) -> None:
    run = make_run()
    settings = run.parent / "base" / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": 0}))  # another token than the template's end of turn
    opened = open_run(run)
    write(opened, Artefact(ArtefactKind.DENSE, GgufType.F16, "dequantized"), tmp_path / "out")
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert set(ends) == {*opened.template.stop_ids, 0}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == opened.template.chat_template


@pytest.mark.parametrize("rslora", [True, False])
def test_an_exported_adapter_needs_no_rslora(make_run: Callable, tmp_path: Path, rslora: bool) -> None:
    run = make_run(rslora=rslora)
    write(open_run(run), Artefact(ArtefactKind.PEFT, GgufType.F16, "dequantized"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["use_rslora"] is False
    assert config["lora_alpha"] == pytest.approx(16.0 if rslora else 8.0)  # 8 / sqrt(4) = 16 / 4

    def tuned(adapter: Path) -> Tensor:
        base = AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype=torch.float32)
        return logits(PeftModel.from_pretrained(base, adapter).eval())

    torch.testing.assert_close(tuned(tmp_path / "out"), tuned(run / "adapter"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 0.003), ("bf16", 0.02), ("q8_0", 0.05), ("q4_0", 0.5)])
def test_gguf_in_transformers(
    make_run: Callable, tmp_path: Path, family: str, kind: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "cache"))
    run = make_run(family, tie_word_embeddings=family in ("qwen2", "llama"))
    opened, out = open_run(run), tmp_path / "out"
    write(opened, Artefact(ArtefactKind.GGUF, GgufType(kind), "dequantized"), out)
    theirs = logits(merged_by_peft(run, dequantized=True))
    assert_near(logits(load_model(open_model(str(out / "model.gguf")), None, torch.float32)), theirs, tolerance)
    if family != "qwen3":  # whose head_dim transformers' reader drops
        loaded = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)
        assert_near(logits(loaded), theirs, tolerance)
    tokenizer = AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")
    text = "<|im_start|>user\nWhat is 12  plus naïve?<|im_end|>\n"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == opened.template.encoder.encode(text)
    assert tokenizer.chat_template == opened.template.chat_template
    assert (out / "Modelfile").read_text().startswith("FROM ./model.gguf\n")


@pytest.mark.parametrize("layout", ["inputs of layers, keys read by others", "values that are keys"])
@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 0.003), ("q4_0", 0.6)])
def test_a_gemma_4_gguf_is_read_back(
    make_run: Callable, tmp_path: Path, layout: str, kind: str, tolerance: float
) -> None:
    run = make_run("gemma4_text", **GEMMA4[layout])
    write(open_run(run), Artefact(ArtefactKind.GGUF, GgufType(kind), "dequantized"), tmp_path / "out")
    theirs = logits(merged_by_peft(run, dequantized=True))
    source = open_model(str(tmp_path / "out" / "model.gguf"))
    assert_near(logits(load_model(source, None, torch.float32)), theirs, tolerance)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(source.path).tensors}
    assert types.get("per_layer_token_embd.weight", "none") in ("none", {"f16": "F16", "q4_0": "Q8_0"}[kind])


def test_a_sentencepiece_gguf_has_the_run_s_tokens(sentencepiece_run: Path, tmp_path: Path) -> None:
    """Spaces before the text and after special tokens, several, and bytes; llama.cpp's way is in test_llama_cpp.py."""
    opened = open_run(sentencepiece_run)
    write(opened, Artefact(ArtefactKind.GGUF, GgufType.F16, "original"), tmp_path / "out")
    read_back = open_model(str(tmp_path / "out" / "model.gguf")).load_tokenizer()
    for text in sentencepiece_texts():
        assert read_back(text, add_special_tokens=False)["input_ids"] == opened.template.encoder.encode(text), text
    assert GgufFile(tmp_path / "out" / "model.gguf").metadata["tokenizer.ggml.model"] == (
        "gemma4" if opened.source.config.model_type == "gemma4_text" else "llama"
    )
    assert read_back("x")["input_ids"][0] == opened.template.tokenizer.bos_token_id
    assert read_back.chat_template == opened.template.chat_template


def sentencepiece_texts() -> list[str]:
    """Conversations as the template renders them, and others that begin with bos."""
    rng = random.Random(0)
    pieces = [
        "What",
        " is",
        "  12",
        " plus",
        "\n",
        "\n\n ",
        "naïve",
        "東京 🙂",
        "</s>",
        " [/INST]",
        "\t",
        "I'm",
        " ",
        "▁",
    ]
    return ["<s>" + "".join(rng.choices(pieces, k=rng.randint(0, 12))) for _ in range(200)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_adapter_read_back(make_run: Callable, tmp_path: Path, family: str) -> None:
    run = make_run(family, rslora=True)
    opened = open_run(run)
    write(opened, Artefact(ArtefactKind.GGUF_ADAPTER, GgufType.F16, "dequantized"), tmp_path / "out")
    alpha, matrices = read_gguf_adapter(tmp_path / "out" / "adapter.gguf", opened.source)
    stored = StoredAdapter(run / "adapter")
    assert alpha == pytest.approx(4 * stored.scaling_of(stored.names[0])) and sorted(matrices) == stored.names
    for name, (a, b) in matrices.items():
        ours = stored.matrices(name, a.shape[1], b.shape[0])
        assert torch.equal(a, ours[0]) and torch.equal(b, ours[1]), name


def test_rotary_rows_of_a_gguf_adapter_follow_the_weight_s(make_run: Callable, tmp_path: Path) -> None:
    """llama.cpp adds B·A to the weight as it lies in its own file, so both must be reordered alike."""
    import gguf

    run = make_run("llama")
    opened = open_run(run)
    write(opened, Artefact(ArtefactKind.GGUF_ADAPTER, GgufType.F16, "original"), tmp_path / "lora")
    write(opened, Artefact(ArtefactKind.GGUF, GgufType.F16, "original"), tmp_path / "merged")
    adapter = {
        t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(tmp_path / "lora" / "adapter.gguf").tensors
    }
    merged = {t.name: t for t in gguf.GGUFReader(tmp_path / "merged" / "model.gguf").tensors}
    base = AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype=torch.float32).state_dict()
    for name, layer, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2), ("attn_v", "v_proj", 0)):
        weight = base[f"model.layers.0.self_attn.{layer}.weight"]
        if heads:  # convert_hf_to_gguf's `permute`
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        key = f"blk.0.{name}.weight"
        delta = 2.0 * adapter[f"{key}.lora_b"] @ adapter[f"{key}.lora_a"]
        stored = torch.from_numpy(merged[key].data.astype("float32"))
        torch.testing.assert_close(stored, weight + delta, rtol=2e-3, atol=2e-3)


def test_survival_of_a_small_change(make_run: Callable, tmp_path: Path) -> None:
    """At 1 % of the weights, rounding from the original keeps ΔW, from the lattice trained on it swallows it."""
    run = make_run(size=0.01, hidden_size=256, intermediate_size=512)
    opened = open_run(run)
    kept = write(opened, Artefact(ArtefactKind.FOUR_BIT, GgufType.F16, "original"), tmp_path / "original")
    lost = write(opened, Artefact(ArtefactKind.FOUR_BIT, GgufType.F16, "dequantized"), tmp_path / "dequantized")
    assert kept is not None and lost is not None
    assert 0.8 < kept < 1.2  # the rounding's own noise is ten times ΔW; few weights average it out only so far
    assert lost < 0.4


def test_survival_is_one_where_nothing_is_rounded(make_run: Callable) -> None:
    merged = MergedSource(open_run(make_run()), "original")
    assert merged.survival(merged) == pytest.approx(1.0, abs=1e-5)
    untuned = MergedSource(open_run(make_run("qwen2")), "original")
    assert untuned.survival(untuned.opened.source) == pytest.approx(0.0, abs=1e-5)


def test_merged_sources_are_told_apart(make_run: Callable) -> None:
    opened = open_run(make_run())
    original, dequantized = (MergedSource(opened, onto).fingerprint() for onto in ("original", "dequantized"))
    assert len({original, dequantized, opened.source.fingerprint()}) == 3
    assert MergedSource(opened, "original").fingerprint() == original
    assert MergedSource(open_run(make_run(size=0.2)), "original").fingerprint() != original


def test_the_faithful_merge_is_onto_the_base_that_was_loaded(make_run: Callable, tmp_path: Path) -> None:
    """A run may be trained on four bits of its own making, kept in a folder, and not on those of the options."""
    opened = open_run(make_run())
    quantize_folder(opened.source, BaseFormats(QuantSpec("fp4")), tmp_path / "kept")
    opened = replace(opened, base=open_model(str(tmp_path / "kept")))
    name = "model.layers.1.mlp.up_proj.weight"
    stored = opened.base.read(name)
    assert isinstance(stored, QuantizedTensor)
    faithful, original = MergedSource(opened, "dequantized"), MergedSource(opened, "original")
    assert torch.equal(faithful.read_base(name), dequantize(stored, torch.float32))
    assert torch.equal(original.read_base(name), opened.source.read(name).float())
    delta = faithful.read_delta(name)
    assert delta is not None and torch.equal(faithful.read(name), faithful.read_base(name) + delta)
