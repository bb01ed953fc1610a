"""A run with adapters on every expert: gone on with to the bit, merged, and each expert's ΔW asked after."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nybble.exporting.arrival import deltas_arrived
from nybble.exporting.artefact import Artefact, write
from nybble.exporting.merged_source import MergedSource
from nybble.formats.gguf import GgufFile
from nybble.formats.safetensors import row_entry
from nybble.options.use_groups import ArtefactKind, GgufType
from nybble.options.verbs import load_config
from nybble.runs.open_run import load_tuned, open_run
from nybble.training.session import train

EXPERT = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture
def run(tiny_mixture: Path, data: Path, tmp_path: Path) -> Path:
    def options(name: str, **others: object):
        given = {
            "model": str(tiny_mixture),
            "data": str(data),
            "out": str(tmp_path / name),
            "rows_per_step": 8,
            "lr": 0.02,
        }
        given |= {"target_modules": "all-linear,experts", "rank": 2, "compute_dtype": "fp32", "save_every": 2}
        return load_config(None, given | others)

    train(options("run", max_steps=4))
    train(options("again", max_steps=2))
    train(options("again", max_steps=4, resume=True, allow_change="config"))
    files = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "again")]
    assert files[0] == files[1]
    return tmp_path / "run"


def test_each_experts_delta_is_in_the_merged_model(run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    opened, ids = open_run(run), torch.arange(5, 25)[None]
    folder = tmp_path / "merged"
    write(opened, Artefact(ArtefactKind.DENSE, GgufType.F16, "dequantized"), folder)
    merged = MergedSource(opened, "dequantized")
    (check,) = deltas_arrived(merged, ArtefactKind.DENSE, folder, None, GgufType.F16)
    assert check.passed and check.found.startswith("24 of 24"), check
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
    ours = load_tuned(opened, torch.float32, torch.device("cpu"))(input_ids=ids).logits
    assert float((ours - theirs).norm() / ours.norm()) < 0.02, "what bf16 loses"

    for to, gguf_type in ((ArtefactKind.GGUF, GgufType.Q8_0), (ArtefactKind.GGUF_ADAPTER, GgufType.F16)):
        write(opened, Artefact(to, gguf_type, "dequantized"), tmp_path / to)
        (check,) = deltas_arrived(merged, to, tmp_path / to, None, gguf_type)
        assert check.passed and check.found.startswith("24 of 24"), check
    write(opened, Artefact(ArtefactKind.GGUF, GgufType.F16, "dequantized"), tmp_path / "f16")
    file = tmp_path / "f16" / "model.gguf"
    with open(file, "r+b") as stream:
        stream.seek(row_entry(GgufFile(file).entries["blk.1.ffn_down_exps.weight"], 2).start)
        stream.write(merged.read_base_expert(EXPERT, 2).half().numpy().tobytes())
    (check,) = deltas_arrived(merged, ArtefactKind.GGUF, tmp_path / "f16", None, GgufType.F16)
    assert not check.passed and f"23 of 24; not {EXPERT}.2 (0%)" in check.found, check

    tensors = load_file(folder / "model.safetensors")
    tensors[EXPERT][2] = merged.read_base_expert(EXPERT, 2).to(tensors[EXPERT].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (check,) = deltas_arrived(merged, ArtefactKind.DENSE, folder, None, GgufType.F16)
    assert not check.passed and f"23 of 24; not {EXPERT}.2 (0%)" in check.found, check
