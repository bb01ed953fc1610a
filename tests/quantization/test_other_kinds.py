"""Four-bit folders of models that are no decoders: their bits, what of them is kept, and runs over them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import classify
from tiny import make_data
from tiny_encoders import make_encoder
from tiny_pictures import make_pictures, make_vision
from tiny_seq2seq import make_seq2seq
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

import nybble
from nybble.errors import ConfigError
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.kernels.ops.four_bit import quantize
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.runs.events import read_events
from nybble.sources.load import load_model
from nybble.sources.open import open_model
from nybble.sources.skeleton import stored_task
from nybble.sources.task import PICTURES, SCORES, Task

WORDS = ("good", "bad")
ROWS = [{"text": f"{WORDS[n % 2]} {n * 7 % 60}", "label": WORDS[n % 2]} for n in range(40)]


def check_bits(folder: Path, task: Task, base: Path, base_task: Task) -> None:
    """Every layer in four bits has the bits of the 16-bit model's."""
    stored = load_model(open_model(str(folder)).for_task(task), BaseFormats(), torch.float32)
    plain = load_model(open_model(str(base)).for_task(base_task), None, torch.float32)
    layers = {name: each for name, each in stored.named_modules() if isinstance(each, QuantizedLinear)}
    assert len(layers) > 4
    for name, layer in layers.items():
        expected = quantize(plain.get_submodule(name).weight, QuantSpec())
        assert torch.equal(layer.packed, expected.packed) and torch.equal(layer.scales, expected.scales), name


@pytest.mark.parametrize("kind", ["bert", *(pytest.param(each, marks=pytest.mark.slow) for each in ("vit", "siglip"))])
def test_a_bare_model_in_four_bits_is_trained_over(kind: str, tmp_path: Path) -> None:
    pictures = kind != "bert"
    base = make_vision(tmp_path / "base", kind) if pictures else make_encoder(tmp_path / "base", kind)
    folder = nybble.quantize(model=base, out=tmp_path / "four").folder
    check_bits(folder, PICTURES if pictures else SCORES, base, PICTURES if pictures else SCORES)
    data = make_pictures(tmp_path / "pictures") if pictures else make_data(tmp_path / "rows.jsonl", ROWS)
    losses = []
    for model in (base, folder):
        run = classify(model, data, tmp_path / f"run-{model.name}", max_steps=6, eval_every=6, quality="absmax")
        *_, last = read_events(run / "events.jsonl", "eval")
        losses.append(last["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)  # matrices outside the blocks are rounded to 16 bits


@pytest.mark.parametrize("head", [True, pytest.param("tags", marks=pytest.mark.slow)])
def test_a_head_for_scores_is_kept(head: Any, tmp_path: Path) -> None:
    base = make_encoder(tmp_path / "base", head=head, id2label={0: "off", 1: "on"}, label2id={"off": 0, "on": 1})
    folder = nybble.quantize(model=base, out=tmp_path / "four").folder
    source = open_model(str(folder))
    task = stored_task(source.config)
    assert task.labels == ("off", "on") and task.stored_head and not source.for_task(task).fresh
    make = AutoModelForTokenClassification if head == "tags" else AutoModelForSequenceClassification
    own = make.from_pretrained(base).classifier.weight
    loaded = load_model(source.for_task(task), BaseFormats(), torch.float32)
    assert torch.equal(loaded.classifier.weight, own.bfloat16().float())


def test_what_no_head_is_for_is_left_out_and_said(tmp_path: Path) -> None:
    from transformers import AutoConfig, BertForMaskedLM

    base = make_encoder(tmp_path / "base")
    BertForMaskedLM(AutoConfig.from_pretrained(base)).save_pretrained(base)
    said: list[Any] = []
    nybble.quantize(model=base, out=tmp_path / "four", on_event=said.append)
    assert any("left out" in str(event) and "cls.predictions" in str(event) for event in said)


def test_calibrating_what_is_no_decoder_is_refused(tmp_path: Path) -> None:
    base = make_seq2seq(tmp_path / "base")
    with pytest.raises(ConfigError, match="is an encoder-decoder, and calibrated is asked for"):
        nybble.quantize(model=base, out=tmp_path / "four", quality="calibrated")
