"""GGUF files in llama.cpp itself, where llama-cpp-python is installed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import MIXTURES

from nybble.exporting.artefact import Artefact, write
from nybble.exporting.consumers import LlamaCppConsumer
from nybble.exporting.merged_source import MergedSource
from nybble.families import FAMILIES
from nybble.options.use_groups import ArtefactKind, GgufType
from nybble.runs.adapter_files import WEIGHTS_NAME
from nybble.runs.open_run import open_run
from nybble.sources.load import load_model
from nybble.sources.open import open_model

pytestmark = pytest.mark.slow
pytest.importorskip("llama_cpp")

TEXTS = (
    "<|im_start|>user\nWhat is 12  plus 3456, don't?<|im_end|>\n<|im_start|>assistant\n",
    "naïve café 東京 🙂\n\n\n  indented\t!",
)


def consumer(file: Path, adapter: Path | None = None) -> LlamaCppConsumer:
    return LlamaCppConsumer("llama.cpp", file, 256, adapter)


def check(found: LlamaCppConsumer, run: Path, onto: str, tolerance: float) -> None:
    """Logits and tokens are the merged model's."""
    opened = open_run(run)
    model = load_model(MergedSource(opened, onto), None, torch.float32)
    for text in TEXTS:
        ids = opened.template.encoder.encode(text)
        assert found.encode(text) == ids
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).logits[0]
        logits = found.logits(ids, torch.arange(len(ids)))
        assert (logits - expected).norm() < tolerance * expected.norm(), (logits - expected).norm() / expected.norm()
    assert found.stop_ids >= set(opened.template.stop_ids)
    assert found.chat_template == opened.template.chat_template


ALIKE = ("llama", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize("family", ALIKE)
@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 0.01), ("q8_0", 0.06)])
def test_models(make_run: Callable, tmp_path: Path, family: str, kind: str, tolerance: float) -> None:
    run = make_run(family, tie_word_embeddings=family == "qwen2")
    write(open_run(run), Artefact(ArtefactKind.GGUF, GgufType(kind), "dequantized"), tmp_path / "out")
    check(consumer(tmp_path / "out" / "model.gguf"), run, "dequantized", tolerance)


PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LONG = {  # llama.cpp takes the long factors where its context, 256 tokens here, is longer than the original one
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256,
    "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.0 + i for i in range(8)],
}  # fmt: skip
GROWING = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.6, "llama_4_scaling_beta": 0.4,
}  # fmt: skip
GEMMA4 = {
    "head_dim": 16, "global_head_dim": 32, "sliding_window": 6, "pad_token_id": None, "vocab_size_per_layer_input": 300,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "rope_theta": 5e4, "partial_rotary_factor": 0.5, "factor": 2.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
    },
}  # fmt: skip
WITHOUT = {"ministral"}  # families that are not exported
OTHERS = {  # layers of all kinds; windows and partial angles that the texts tell from none
    "gemma2": {
        "num_hidden_layers": 3, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6,
        "attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0,
    },
    "gemma3_text": {
        "num_hidden_layers": 7, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        },
    },
    "gemma4_text": GEMMA4 | {
        "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True, "hidden_size_per_layer_input": 32, "final_logit_softcapping": 4.0,
    },
    "gemma4_text, values that are keys": GEMMA4 | {
        "num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "attention_k_eq_v": True,
        "num_global_key_value_heads": 1, "use_bidirectional_attention": "vision", "tie_word_embeddings": False,
    },
    "ministral3": {"head_dim": 16, "rope_parameters": GROWING, "pad_token_id": None},
    "smollm3": {"num_hidden_layers": 5, "no_rope_layers": None, "pad_token_id": None},
    "granite": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.6, "attention_multiplier": 0.2, "logits_scaling": 1.5
    },
    "olmo2": {"pad_token_id": None},
    "olmo3": {"num_hidden_layers": 4, "sliding_window": 6, "pad_token_id": None},
    "phi3": {"rope_parameters": PARTIAL, "pad_token_id": None},
    "phi3, long": {"rope_parameters": LONG, "original_max_position_embeddings": 256, "pad_token_id": None},
    "glm": {"head_dim": 16, "attention_bias": True, "rope_parameters": PARTIAL, "pad_token_id": None},
    "glm4": {"head_dim": 16, "rope_parameters": PARTIAL, "pad_token_id": None},
    "cohere": {"logit_scale": 0.4, "tie_word_embeddings": True},
    "cohere2": {"num_hidden_layers": 5, "sliding_window": 6, "logit_scale": 0.4, "tie_word_embeddings": True},
    "stablelm": {"use_qkv_bias": True, "rope_parameters": PARTIAL},
    "stablelm, parallel": {"use_parallel_residual": True, "rope_parameters": PARTIAL},
    "phi": {"rope_parameters": PARTIAL, "pad_token_id": None},
    "starcoder2": {"sliding_window": None},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_other_families(make_run: Callable, tmp_path: Path, name: str) -> None:
    family = name.partition(",")[0]
    assert set(FAMILIES) - {*ALIKE, *MIXTURES} == WITHOUT | {n.partition(",")[0] for n in OTHERS}
    run = make_run(family, **OTHERS[name])
    write(open_run(run), Artefact(ArtefactKind.GGUF, GgufType.F16, "original"), tmp_path / "out")
    check(consumer(tmp_path / "out" / "model.gguf"), run, "original", 0.01)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 0.01), ("q8_0", 0.3)])  # rounding sends some tokens elsewhere
def test_mixtures(make_run: Callable, tmp_path: Path, family: str, kind: str, tolerance: float) -> None:
    run = make_run(family, experts=True)
    write(open_run(run), Artefact(ArtefactKind.GGUF, GgufType(kind), "dequantized"), tmp_path / "out")
    check(consumer(tmp_path / "out" / "model.gguf"), run, "dequantized", tolerance)


def test_sentencepiece(sentencepiece_run: Path, tmp_path: Path) -> None:
    opened = open_run(sentencepiece_run)
    write(opened, Artefact(ArtefactKind.GGUF, GgufType.F16, "original"), tmp_path / "out")
    found = consumer(tmp_path / "out" / "model.gguf")
    read_back = open_model(str(tmp_path / "out" / "model.gguf")).load_tokenizer()
    for text in ("<s>[INST] hello  there [/INST] yes</s>", "<s>\n naïve 東京\t</s> x", "<s>a\n\n\n\n\n b\n"):
        assert found.encode(text) == opened.template.encoder.encode(text)
    for text in ("no bos", " a space", "</s>after", "  two"):
        assert found.encode(text) == read_back(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 10000.0,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotary_frequencies(make_run: Callable, tmp_path: Path, rope: dict) -> None:
    run = make_run("llama", rope_parameters=rope)
    write(open_run(run), Artefact(ArtefactKind.GGUF, GgufType.F16, "original"), tmp_path / "out")
    check(consumer(tmp_path / "out" / "model.gguf"), run, "original", 0.01)


GEMMAS = [name for name in OTHERS if name.startswith("gemma4")]


@pytest.mark.parametrize("name", ["llama", "qwen3", "granite", "phi3", "cohere2", "starcoder2", *GEMMAS, *MIXTURES])
def test_adapters_on_their_base(make_run: Callable, tmp_path: Path, name: str) -> None:
    run = make_run(name.partition(",")[0], rslora=True, experts=name in MIXTURES, **OTHERS.get(name, {}))
    untuned = tmp_path / "untuned"
    shutil.copytree(run, untuned)
    tensors = load_file(run / "adapter" / WEIGHTS_NAME)
    save_file({key: torch.zeros_like(t) for key, t in tensors.items()}, untuned / "adapter" / WEIGHTS_NAME)
    write(open_run(untuned), Artefact(ArtefactKind.GGUF, GgufType.F16, "original"), tmp_path / "base")
    write(open_run(run), Artefact(ArtefactKind.GGUF_ADAPTER, GgufType.F16, "original"), tmp_path / "lora")
    found = consumer(tmp_path / "base" / "model.gguf", tmp_path / "lora" / "adapter.gguf")
    check(found, run, "original", 0.02)
