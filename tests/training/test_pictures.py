"""Telling pictures apart: losses and gradients, whole runs over vision models, what others read of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from PIL import Image
from short_runs import classify
from tiny_encoders import with_head
from tiny_pictures import SIDE, make_pictures, make_vision, picture
from transformers import AutoImageProcessor, pipeline

import nybble
from nybble.data.picture_rows import picture_batch
from nybble.data.text_rows import TextRow
from nybble.errors import ConfigError, ExportError, ModelError
from nybble.exporting.consumers import widen
from nybble.layers.picture_model import PictureModel
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.options.verbs import load_config
from nybble.runs.events import read_events
from nybble.runs.open_run import load_frozen, load_tuned, open_run
from nybble.sources.open import open_model
from nybble.sources.task import PICTURES
from nybble.training.session import train

CPU = torch.device("cpu")
STEPS = 40


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vision(tmp_path_factory.mktemp("vision") / "vit")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures") / "stripes")


@pytest.fixture(scope="module")
def vit_run(vision: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    return classify(
        vision, pictures, out, max_steps=STEPS, eval_every=STEPS, save_every=12, augment="flip", memory="4GB", rank=8
    )


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("dinov2_with_registers", "deit", "beit", "vit_msn")]


@pytest.mark.parametrize("kind", ["vit", "dinov2", "siglip", *SLOW])
def test_losses_and_gradients_are_the_models_own(kind: str, tmp_path: Path) -> None:
    """In four bits, of pictures together, against transformers' own loss of each alone."""
    from dataclasses import replace

    from nybble.training.classify import objective_for

    folder = make_vision(tmp_path / kind, kind)
    source = open_model(str(folder)).for_task(replace(PICTURES, labels=("a", "b", "c")))
    model = with_head(source)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 12
    ours = PictureModel.of(model)
    assert ours.verdict.path == "generic" and ours.backbone.layout == "padded"
    pixels = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    nothing = torch.zeros(17, dtype=torch.int32)
    rows = [TextRow(nothing, nothing.bool(), "row", target=float(n)) for n in range(3)]
    objective = objective_for(source.task)
    part = objective.loss(ours, picture_batch(rows, pixels), objective.totals(ours, rows, 3))
    part.loss.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.cat([p.grad.flatten() for p in parameters])
    model.zero_grad()
    total = sum(model(pixel_values=each, labels=torch.tensor([n])).loss / 3 for n, each in enumerate(pixels.split(1)))
    total.backward()
    own = torch.cat([p.grad.flatten() for p in parameters])
    assert part.loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert float((found - own).norm() / own.norm()) < 1e-5


def test_a_vision_model_learns_and_goes_on_to_the_bit(vit_run: Path) -> None:
    first, last = read_events(vit_run / "events.jsonl", "eval")
    assert last["loss"] < first["loss"] and last["accuracy"] > 0.85
    whole = (vit_run / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(vit_run / "checkpoints" / f"step-{STEPS}")
    train(load_config(vit_run / "config.yaml", {"out": str(vit_run), "resume": True}))
    assert (vit_run / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    assert json.loads((vit_run / "task.json").read_text())["kind"] == "pictures"
    assert (vit_run / "adapter" / "preprocessor_config.json").is_file()


def test_peft_gives_the_same_scores(vit_run: Path) -> None:
    opened = open_run(vit_run)
    tuned, base = load_tuned(opened, torch.float32, CPU), load_frozen(opened, torch.float32, CPU)
    widen(base)
    theirs = peft.PeftModel.from_pretrained(base.float(), opened.run.adapter).eval()
    processor = AutoImageProcessor.from_pretrained(opened.run.adapter)
    pixels = processor(images=[picture("down", 5)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixel_values=pixels).logits, tuned(pixel_values=pixels).logits)


def test_evaluated_asked_and_merged(vit_run: Path, pictures: Path, tmp_path: Path) -> None:
    judged: Any = nybble.evaluate(vit_run)
    report = json.loads((vit_run / "report" / "report.json").read_text())
    assert report["accuracy"]["value"] == pytest.approx(judged.confusion.trace() / judged.confusion.sum())
    assert "accuracy (top-1)" in report["figures"] and (vit_run / "report" / "confusion.png").exists()
    asked = [str(pictures / kind / "003.png") for kind in ("across", "slanted")]
    answers = nybble.open_run(vit_run).classify(asked)
    merged = nybble.merge(vit_run, out=tmp_path / "merged")
    assert merged.outcome == "verified", merged.verification
    theirs = pipeline("image-classification", model=str(merged.folder), top_k=1)
    for path, (label, probability) in zip(asked, answers, strict=True):
        (found,) = theirs(Image.open(path))
        assert found["label"] == label and found["score"] == pytest.approx(probability, abs=0.02)
    with pytest.raises(ExportError, match="language models"):
        nybble.export(vit_run, to="gguf", out=tmp_path / "gguf")


def test_options_of_texts_are_refused(vision: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max-seq-len is 64, and the model reads pictures"):
        classify(vision, pictures, tmp_path / "run", max_seq_len=64)
    with pytest.raises(ConfigError, match="calibrated"):
        classify(vision, pictures, tmp_path / "run", quality="calibrated")
    texts = tmp_path / "t.jsonl"
    texts.write_text("".join(json.dumps({"text": f"t {n}", "label": n % 2}) + "\n" for n in range(9)))
    from tiny_encoders import make_encoder

    with pytest.raises(ConfigError, match="augment is crop, and the model reads texts"):
        classify(make_encoder(tmp_path / "bert"), texts, tmp_path / "run", augment="crop")


def test_a_plan_counts_patches(vision: Path, pictures: Path) -> None:
    for more in ({}, {"data": str(pictures)}):
        plan = nybble.plan(model=vision, objective="classify", memory="4GB", **more).chosen
        assert plan is not None and plan.batches.longest_row == 17 and "room for logits" not in plan.components


def test_a_vision_model_that_is_to_write_is_told_what_it_can_learn(vision: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"vision model(?s:.*)--objective classify"):
        classify(vision, data, tmp_path / "run", objective="sft")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "said"), [("siglip2", "cuts pictures into patches"), ("dinov3_vit", "has no classifier made of it")]
)
def test_vision_models_that_no_scores_can_be_had_of(kind: str, said: str, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=said):
        classify(make_vision(tmp_path / "base", kind), pictures, tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()


def test_digits_are_told_apart(tmp_path: Path) -> None:
    """scikit-learn's 1,797 scanned digits of 8 x 8 pixels, by a vision transformer whose own weights are random."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = tmp_path / "digits" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype("uint8")).save(folder / f"{number:04}.png")
    model = make_vision(tmp_path / "vit", hidden_size=64, intermediate_size=128, num_hidden_layers=3)
    more = {"max_steps": 300, "eval_every": 300, "save_every": 300, "rows_per_step": 32, "micro_batch_size": 32}
    out = classify(model, tmp_path / "digits", tmp_path / "run", **more, rank=32, lr=5e-3)
    first, last = read_events(out / "events.jsonl", "eval")
    print(first, last)
    assert first["accuracy"] < 0.2 and last["accuracy"] > 0.8
    test_peft_gives_the_same_scores(out)
