"""Folders that nybble writes, opened by transformers 4, which many installations of servers have."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from nybble.exporting.artefact import Artefact, write
from nybble.exporting.consumers import _load_four_bit
from nybble.options.use_groups import ArtefactKind, GgufType
from nybble.quantization.folder import save_config
from nybble.runs.open_run import open_run
from nybble.sources.tokenizer import save_tokenizer

PYTHON = Path(__file__).parents[2] / ".venv-transformers4" / "bin" / "python"
READER = Path(__file__).with_name("read_with_transformers4.py")
TEXTS = ["What is 12  plus naïve?", "<|im_start|>user\nIt is 4.<|im_end|>\n", " <|endoftext|>x"]
IDS = [70, 5, 33, 90, 12, 200, 41, 7, 8, 9, 3, 44, 71, 70, 5, 33, 90, 12]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8, "rope_theta": 500.0}
FAMILIES = {
    "llama": {"rope_parameters": LLAMA3},
    "mistral": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "qwen2": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0}},
    "qwen3": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
}


def with_transformers_4(asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    done = subprocess.run([PYTHON, READER], input=json.dumps(asked), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def with_ours(kind: str, run: Path, folder: Path) -> torch.Tensor:
    if kind == "nf4":
        model = _load_four_bit(open_run(run), folder, torch.float32).model
    elif kind == "peft":
        base = AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits[0].float()


@pytest.mark.slow
@pytest.mark.skipif(
    not PYTHON.exists(), reason="no environment with transformers 4: `make .venv-transformers4/.installed` needs PyPI"
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_folder_is_opened(make_run: Callable, tmp_path: Path, family: str) -> None:
    run = make_run(family, **FAMILIES[family])
    opened = open_run(run)
    opened.template.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    shutil.copytree(run.parent / "base", tmp_path / "base")
    save_config(opened.source.config, tmp_path / "base")  # the adapter's base, in a form that transformers 4 reads
    asked = []
    for kind in ("peft", "16bit", "nf4"):
        write(opened, Artefact(ArtefactKind(kind), GgufType.F16, "dequantized"), tmp_path / kind)
        base = str(tmp_path / "base") if kind == "peft" else None
        asked.append({"folder": str(tmp_path / kind), "base": base, "texts": TEXTS, "ids": IDS})
    for there, found in zip(asked, with_transformers_4(asked), strict=True):
        folder = Path(there["folder"])
        ours = with_ours(folder.name, run, folder)
        torch.testing.assert_close(torch.tensor(found["logits"]), ours, rtol=1e-4, atol=1e-4)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert found["tokens"] == [tokenizer(text)["input_ids"] for text in TEXTS]
        chat = [{"role": "user", "content": "hello"}]
        assert found["chat"] == tokenizer.apply_chat_template(chat, tokenize=False)


# ---- the files themselves ------------------------------------------------------------------------


def test_settings_have_both_forms(make_run: Callable, tmp_path: Path) -> None:
    """What transformers 4 asks for, and transformers 5 reads the same from it."""
    run = make_run("llama", rope_parameters=LLAMA3)
    opened = open_run(run)
    tokenizer = opened.template.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    save_tokenizer(tokenizer, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<|im_start|>"] and "extra_special_tokens" not in settings
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(tmp_path).all_special_tokens
    save_config(opened.source.config, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 500.0 and config["torch_dtype"] == config["dtype"]
    assert config["rope_scaling"] == {key: value for key, value in LLAMA3.items() if key != "rope_theta"}


ROPES = {
    "gemma3_text": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    "phi3": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "rope_theta": 1e4,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 64,
    },
    "stablelm": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    "qwen2": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("family", ROPES)
def test_rope_is_read_back_as_it_was(tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig

    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = AutoConfig.for_model(family, rope_parameters=ROPES[family], **shape, vocab_size=96, pad_token_id=0)
    save_config(config, tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    kept = {key: value for key, value in again.rope_parameters.items() if key != "type"}  # an older "rope_type"
    assert kept == config.rope_parameters
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"]
