"""Rows of tokens that the base never learnt are trained, kept, resumed, read by PEFT and merged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import byte_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nybble.errors import ConfigError, RunError
from nybble.exporting.merged_source import MergedSource
from nybble.layers.convert import enable_adapters
from nybble.options.verbs import load_config
from nybble.quantization.folder import save_dense_folder
from nybble.runs.adapter_files import TOKENS, StoredAdapter
from nybble.runs.adapter_writing import write_plain_adapter
from nybble.runs.open_run import load_tuned, open_run
from nybble.training.session import train

NEW = "<|tool|>"
WEIGHTS = "adapter/adapter_model.safetensors"
CPU = torch.device("cpu")


@pytest.fixture
def tied() -> bool:
    return True


@pytest.fixture
def start(tied: bool, tmp_path: Path) -> Callable[..., Path]:
    """Trains in 16 bits on a tiny model whose tokenizer has a token that it never learnt; returns the run folder."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([NEW], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "base")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer) + 5, tie_word_embeddings=tied, bos_token_id=None, **sizes)
    config.eos_token_id = tokenizer.eos_token_id
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"What is {n}?", "completion": f"{NEW}It is {n}."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(out: str = "run", **more: Any) -> Path:
        options = {"model": str(tmp_path / "base"), "data": str(tmp_path / "rows.jsonl"), "out": str(tmp_path / out)}
        options |= {"rows_per_step": 6, "compute_dtype": "fp32", "lr": 1e-2, "max_steps": 3, "rank": 4}
        options |= {"format": "none", "train_new_tokens": True}
        train(load_config(None, options | more))
        return tmp_path / out

    return run


def logits(model: nn.Module, token: int) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[70, 5, token, 33, 90, 12]])).logits.float()


@pytest.mark.parametrize(
    ("tied", "packing"),
    [
        (True, True),
        (False, False),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
    ],
)
def test_trained_resumed_read_and_merged(start: Callable[..., Path], tmp_path: Path, tied: bool, packing: bool) -> None:
    run = start(packing=packing, save_every=1, keep_checkpoints=9)
    opened = open_run(run)
    token = opened.template.tokenizer.convert_tokens_to_ids(NEW)
    stored = load_file(run / WEIGHTS)
    rows = {key: tensor for key, tensor in stored.items() if "trainable_tokens_delta" in key}
    assert len(rows) == (1 if tied else 2) and all(tensor.shape == (1, 64) for tensor in rows.values())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    before = {"embed_tokens": base.get_input_embeddings().weight, "lm_head": base.get_output_embeddings().weight}
    for key, tensor in rows.items():
        weight = next(weight for name, weight in before.items() if name in key)
        assert (tensor[0] - weight[token]).abs().max() > 1e-3, "the row was not trained"
    plain = logits(base, token)
    model = load_tuned(opened, torch.float32, CPU)
    ours = logits(model, token)
    theirs = PeftModel.from_pretrained(base, run / "adapter")
    torch.testing.assert_close(ours, logits(theirs, token), rtol=1e-3, atol=1e-4)
    enable_adapters(model, False)
    torch.testing.assert_close(logits(model, token), plain, rtol=1e-4, atol=1e-5)

    whole = (run / WEIGHTS).read_bytes()
    shutil.rmtree(run / "checkpoints" / "step-3")
    train(load_config(run / "config.yaml", {"out": str(run), "resume": True}))
    assert (run / WEIGHTS).read_bytes() == whole

    save_dense_folder(MergedSource(opened, "dequantized"), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, token), ours, rtol=0.03, atol=0.03)  # bf16
    with pytest.raises(RunError, match="trained rows"):
        start("more", adapter=str(run))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_both_ways_learn_the_same(start: Callable[..., Path]) -> None:
    first, second = (load_file(start(str(packing), packing=packing) / WEIGHTS) for packing in (True, False))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=2e-4)


def test_where_it_does_not_fit(start: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="target-modules"):
        start(target_modules="q_proj,embed_tokens")
    (tmp_path / "plain.jsonl").write_text('{"prompt": "What is one?", "completion": "One."}\n' * 9)
    with pytest.raises(ConfigError, match="no token that the base never learnt"):
        start(data=str(tmp_path / "plain.jsonl"))


@pytest.mark.slow
def test_a_plain_adapter_of_twice_the_rank_has_the_rows_too(start: Callable[..., Path], tmp_path: Path) -> None:
    """What pissa took out of the base is told apart from what was learnt; the rows are as they were."""
    opened = open_run(start(init="pissa", format="nf4", max_steps=1))
    (tmp_path / "plain").mkdir()
    write_plain_adapter(StoredAdapter(opened.trained, on_original=True), opened.source.skeleton, tmp_path / "plain")
    written, kept = load_file(tmp_path / "plain" / "adapter_model.safetensors"), load_file(opened.run.path / WEIGHTS)
    rows = [key for key in kept if key.endswith(TOKENS)]
    assert rows and all(torch.equal(written[key], kept[key]) for key in rows)
    assert StoredAdapter(tmp_path / "plain").tokens == StoredAdapter(opened.trained).tokens
