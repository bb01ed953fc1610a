"""Adapters on embedding and head through merging, export and chat: carried, or refused in words."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from nybble.errors import ExportError, RunError
from nybble.exporting.gguf_model import write_gguf_adapter
from nybble.exporting.merged_source import MergedSource
from nybble.layers.convert import attach_adapters, resolve_targets
from nybble.runs.adapter_files import StoredAdapter, read_adapter
from nybble.runs.adapter_writing import adapter_config, write_adapter
from nybble.runs.open_run import load_frozen, open_run
from nybble.sources.load import load_model


@pytest.fixture
def run_with_ends(make_run) -> Callable[..., Path]:
    """A run whose adapter changes a block's layer, the embedding and the head."""

    def make(tied: bool) -> Path:
        run = make_run(tie_word_embeddings=tied)
        base = AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype=torch.float32)
        names = resolve_targets(base, "v_proj,lm_head,embed_tokens")
        for adapter in attach_adapters(base, names, rank=4, alpha=8.0).values():
            nn.init.normal_(adapter.lora_A, std=0.1)
            nn.init.normal_(adapter.lora_B, std=0.1)
        for file in (run / "adapter").iterdir():
            file.unlink()
        write_adapter(base, run / "adapter", adapter_config(base, str(run.parent / "base")))
        return run

    return make


def test_a_merge_carries_them_as_pefts_does(run_with_ends) -> None:
    run = run_with_ends(tied=False)
    base = AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, run / "adapter").merge_and_unload().state_dict()
    merged = MergedSource(open_run(run), "original")
    for name in merged.tensor_names():
        torch.testing.assert_close(merged.read(name).float(), theirs[name], rtol=1e-5, atol=1e-6)
    assert merged.survival(merged) == pytest.approx(1, abs=1e-4)


def test_on_the_four_bits_they_go_onto_the_16_bit_ends(run_with_ends) -> None:
    opened = open_run(run_with_ends(tied=False))
    merged = load_model(MergedSource(opened, "dequantized"), None, torch.float32)
    tuned = load_frozen(opened, torch.float32, torch.device("cpu"))
    read_adapter(tuned, opened.run.adapter)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        difference = (merged(ids).logits - tuned(ids).logits).abs().max()
        assert difference < 0.02 * tuned(ids).logits.abs().max()  # the ends are merged back into 16 bits


def test_tied_ends_are_not_merged(run_with_ends) -> None:
    with pytest.raises(RunError, match="embedding and head in one"):
        MergedSource(open_run(run_with_ends(tied=True)), "original")


def test_llama_cpps_adapters_refuse_them(run_with_ends, tmp_path: Path) -> None:
    run = run_with_ends(tied=False)
    with pytest.raises(ExportError, match=r"changes lm_head"):
        write_gguf_adapter(StoredAdapter(run / "adapter"), open_run(run).source, tmp_path / "a.gguf")
