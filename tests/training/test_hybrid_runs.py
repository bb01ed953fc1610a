"""Whole runs over models whose layers carry a state: calibrated, merged, exported. That they go on to the bit is tested
with all kinds of runs.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from hybrids import CONFIGS, make_hybrid
from tiny import make_data
from transformers import AutoModelForCausalLM

import nybble
from nybble.errors import NybbleError

OTHERS = sorted(CONFIGS.keys() - {"qwen3_5_text"})


def trained(model: Path, out: Path, data: Path, **more: Any) -> Path:
    options = {"max_steps": 3, "rows_per_step": 4, "micro_batch_size": 2, "rank": 4, "lr": 1e-2}
    options |= {"compute_dtype": "fp32", "quality": "absmax"}
    nybble.train(model=model, data=data, out=out, **options | more)
    return out


@pytest.mark.parametrize("name", ["qwen3_5_text", *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)])
def test_a_merged_run_opens_in_transformers(name: str, tmp_path: Path) -> None:
    model, data = make_hybrid(tmp_path / "model", name), make_data(tmp_path / "rows.jsonl")
    run = trained(model, tmp_path / "run", data)
    merged = nybble.merge(run, out=tmp_path / "merged")
    ids = torch.arange(5, 25)[None]
    theirs, found = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        moved = theirs(input_ids=ids, use_cache=False).logits - base(input_ids=ids, use_cache=False).logits
    assert moved.abs().max() > 1e-3
    with pytest.raises(NybbleError, match=r"gguf|GGUF"):
        nybble.export(run, to="gguf", out=tmp_path / "gguf")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bamba", "jamba", "lfm2", "qwen3_5_text"])
def test_a_base_is_calibrated_and_its_bits_are_mixed_or_it_is_said_why_not(name: str, tmp_path: Path) -> None:
    model, data = make_hybrid(tmp_path / "model", name), make_data(tmp_path / "rows.jsonl")
    few = {"max_steps": 1, "calibration_tokens": 2048}
    if name == "bamba":  # whose layers give more than states
        with pytest.raises(NybbleError, match="cannot be calibrated"):
            trained(model, tmp_path / "calibrated", data, quality="calibrated", **few)
    else:
        trained(model, tmp_path / "calibrated", data, quality="calibrated", **few)
    if name == "jamba":
        with pytest.raises(NybbleError, match="has experts, whose losses --mixed does not measure"):
            trained(model, tmp_path / "mixed", data, mixed=3.5, **few)
    else:
        formats = (trained(model, tmp_path / "mixed", data, mixed=3.5, **few) / "formats.json").read_text()
        assert "nf4" in formats and "in_proj" in formats
