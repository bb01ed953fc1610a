"""Experts calibrated on the tokens that reached them; the others are searched, and named."""

import pytest
import torch
from mixtures import make_mixture

from nybble.events import Note
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.quantization import walk
from nybble.quantization.folder import CalibrationInput, quantize_folder
from nybble.sources.folder import FolderSource
from nybble.sources.load import load_model

WINDOWS = torch.randint(5, 250, (2, 16), generator=torch.Generator().manual_seed(3))
LEAST = {"gate_up_proj": 64 / 8, "down_proj": 96 / 8}


def calibrated(folder, out, report=lambda event: None):
    formats, text = BaseFormats(QuantSpec(block_size=32)), CalibrationInput(WINDOWS, torch.float32)
    source = FolderSource(folder, "base")
    return quantize_folder(source, formats, out, rounding="calibrated", calibration=text, report=report).reports


def test_an_expert_is_calibrated_where_enough_tokens_reached_it(tmp_path, monkeypatch):
    make_mixture("mixtral", tmp_path / "base", torch.bfloat16)
    notes = []
    reports = calibrated(tmp_path / "base", tmp_path / "out", notes.append)
    model = load_model(FolderSource(tmp_path / "out", "out"), BaseFormats(), torch.float32)
    with torch.no_grad():
        logits = model(input_ids=WINDOWS, use_cache=False, output_router_logits=True).router_logits
    searched = []
    for layer, of_layer in enumerate(logits):
        rows = of_layer.topk(2, dim=-1).indices.flatten().bincount(minlength=4).tolist()
        for leaf, least in LEAST.items():
            for expert, count in enumerate(rows):
                name = f"model.layers.{layer}.mlp.experts.{leaf}.{expert}"
                report = next(each for each in reports if each.name == name)
                assert report.method == ("calibrated" if count >= least else "search"), (name, count)
                assert report.method == "search" or report.error < report.absmax_error
                searched += [name] if report.method == "search" else []
    assert searched and len(searched) < 16, "both kinds are seen"
    (note,) = [each for each in notes if isinstance(each, Note)]
    for name in searched:
        stack, _, number = name.rpartition(".")
        listed = note.sentence.partition(f"{stack}: ")[2].partition(";")[0]
        assert number in listed.split(", ")

    # One expert's statistics at a time give the same bits.
    monkeypatch.setattr(walk, "EXPERT_STATISTICS_BYTES", 1)
    calibrated(tmp_path / "base", tmp_path / "again")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_the_text_is_kept_better_than_by_absmax(tmp_path):
    """Of biased experts whose matrices lie the other way round."""
    make_mixture("gpt_oss", tmp_path / "base", torch.bfloat16)
    source = FolderSource(tmp_path / "base", "base")
    exact = load_model(source, None, torch.float32)
    calibrated(tmp_path / "base", tmp_path / "out")
    quantize_folder(source, BaseFormats(QuantSpec(block_size=32)), tmp_path / "plain")
    lost = []
    with torch.no_grad():
        for folder in ("out", "plain"):
            model = load_model(FolderSource(tmp_path / folder, folder), BaseFormats(), torch.float32)
            states = [each(input_ids=WINDOWS, output_hidden_states=True).hidden_states[-1] for each in (model, exact)]
            lost.append(float((states[0] - states[1]).square().mean()))
    assert lost[0] < lost[1]
