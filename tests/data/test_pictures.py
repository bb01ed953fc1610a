"""Rows of pictures: where they come from, how they are decoded and drawn from, and what is wrong with them."""

import base64
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_data
from tiny_encoders import make_encoder
from tiny_pictures import CLASSES, SIDE, make_pictures, make_vision, picture
from transformers import AutoConfig

import nybble
from nybble.data.picture_files import decode
from nybble.data.picture_rows import PictureRow, collate_pictures, random_part
from nybble.data.sources import DataSource, find_files
from nybble.data.text_encoder import RowError
from nybble.errors import ConfigError, DataError, ModelError
from nybble.sources.open import open_model
from nybble.sources.processor import load_processor
from nybble.sources.skeleton import build_skeleton
from nybble.sources.task import PICTURES


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vision(tmp_path_factory.mktemp("vision") / "vit")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures") / "stripes", each=6)


def test_pixels_of_32_bits_are_taken_by_a_model_in_16(tmp_path: Path) -> None:
    """BEiT's embedding, unlike others', takes pixels of its own dtype alone."""
    folder = make_vision(tmp_path / "beit", "beit")
    found = load_processor(str(folder), build_skeleton(AutoConfig.from_pretrained(folder), torch.bfloat16, PICTURES))
    assert found.tokens == 17  # 16 patches and the one that stands for all


def check(model: Path, data: Path | str, **more: Any) -> Any:
    return nybble.check_data(model=model, data=str(data), objective="classify", **more)


def saved(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **more)
    return out.getvalue()


# ---- where they come from ------------------------------------------------------------------------


def test_folders_are_classes(vision: Path, pictures: Path) -> None:
    data = check(vision, pictures)
    assert data.audit.num_rows == 18 and not data.audit.errors
    row = data.train[0]
    assert isinstance(row, PictureRow) and row.label in CLASSES and f"/{row.label}/" in row.origin
    assert len(row) == (SIDE // 4) ** 2 + 1  # patches, and the token in front of them
    assert any(notice.startswith("3 classes: across ") for notice in data.audit.notices)


def test_texts_beside_them_are_no_rows(vision: Path, pictures: Path, tmp_path: Path) -> None:
    """A README among pictures is left alone, and said; for texts to go on with it is what is read."""
    folder = tmp_path / "noted"
    shutil.copytree(pictures, folder)
    (folder / "down" / "README.md").write_text("Where these are from.")
    data = check(vision, folder)
    assert data.audit.num_rows == 18 and any("not read: README.md" in said for said in data.audit.notices)
    found = find_files(DataSource(str(folder), str(folder), None, None), lambda row: "text" in row)
    assert found.paths == [folder / "down" / "README.md"] and not found.pictures


def test_splits_are_folders_of_such(vision: Path, pictures: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        shutil.copytree(pictures, tmp_path / "both" / split)
    with pytest.raises(DataError, match=r"no split named(?s:.*)#train"):
        check(vision, tmp_path / "both")
    shutil.rmtree(tmp_path / "both" / "test" / "down")
    assert check(vision, f"{tmp_path / 'both'}#test").audit.num_rows == 12
    with pytest.raises(DataError, match="no folder of a split 'validation'"):
        check(vision, f"{tmp_path / 'both'}#validation")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_table_beside_them_may_name_them(kind: str, vision: Path, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "named"
    shutil.copytree(pictures, folder)
    names = [(f"{kind}/{number:03}.png", kind.upper()) for kind in CLASSES for number in range(6)]
    if kind == "jsonl":
        lines = [json.dumps({"file_name": name, "label": label}) for name, label in names]
    else:
        lines = ["file_name,label", *(f"{name},{label}" for name, label in names)]
    (folder / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
    data = check(vision, folder)
    assert data.audit.num_rows == 18 and {row.label for row in data.train} == {each.upper() for each in CLASSES}
    assert not any("not read" in notice for notice in data.audit.notices)


def test_files_within_parquet_are_read(vision: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    files = [{"bytes": saved(picture(kind, n)), "path": None} for n in range(4) for kind in CLASSES]
    columns = {"image": files, "label": [0, 1, 2] * 4}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "p.parquet")
    data = check(vision, tmp_path / "p.parquet")
    row = data.train[0]
    assert data.audit.num_rows == 12 and isinstance(row.picture, bytes) and row.label in CLASSES


def test_files_within_rows_are_read_and_addresses_named(vision: Path, tmp_path: Path) -> None:
    """As in conversations."""
    files = [base64.b64encode(saved(picture(kind, n))).decode() for n in range(4) for kind in CLASSES]
    rows = [{"image": f"data:image/png;base64,{file}", "label": n % 3} for n, file in enumerate(files)]
    rows.append({"image": "https://example.org/a.png", "label": 1})
    make_data(tmp_path / "r.jsonl", rows)
    data = check(vision, tmp_path / "r.jsonl")
    assert data.train[0].picture == base64.b64decode(files[0]) and data.audit.num_dropped == 1
    assert {each.rows for each in data.audit.findings if each.id == "picture-url"} == {("r.jsonl:13",)}


def test_models_and_rows_of_two_kinds_are_told_so(vision: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a picture, and the model reads texts"):
        check(make_encoder(tmp_path / "bert"), pictures)
    texts = tmp_path / "t.jsonl"
    texts.write_text('{"text": "a", "label": "x"}\n')
    with pytest.raises(DataError, match="a text, and the model reads pictures"):
        check(vision, texts)
    for objective in ("sft", "embed", "reward"):
        with pytest.raises(ModelError, match="a vision model, which reads pictures and no text"):
            nybble.check_data(model=vision, data=str(texts), objective=objective)
        with pytest.raises(ModelError, match="a vision model, which reads pictures and no text"):
            nybble.plan(model=str(vision), objective=objective)
    with pytest.raises(ConfigError, match="max-seq-len is 64, and the model reads pictures"):
        check(vision, pictures, max_seq_len=64)


# ---- what they hold ------------------------------------------------------------------------------


def test_other_modes_are_converted_as_pillow_and_arithmetic_have_it() -> None:
    image = picture("down", 3)
    for mode in ("L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr"):
        other = image.convert(mode)
        kind = "JPEG" if mode == "CMYK" else "TIFF" if mode == "YCbCr" else "PNG"
        stored = saved(other, kind)
        read = Image.open(io.BytesIO(stored))
        found = decode(stored, "row")
        through = read.convert("RGBA").convert("RGB") if mode in ("P", "LA") else read.convert("RGB")
        assert np.array_equal(np.asarray(found.image), np.asarray(through)), mode
        assert found.notes == (() if read.mode == "RGB" else (f"mode {read.mode}",))
    values = np.arange(400, dtype=np.uint16).reshape(20, 20) * 163
    grey = np.asarray(decode(saved(Image.fromarray(values)), "row").image)
    assert np.array_equal(grey, np.repeat((values // 256).astype(np.uint8)[..., None], 3, axis=2))


def test_pictures_stand_as_their_camera_says() -> None:
    image = picture("slanted", 1).crop((0, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    found = decode(saved(image, "TIFF", exif=exif), "row").image
    assert np.array_equal(np.asarray(found), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


def test_what_is_wrong_with_pictures_is_named(
    vision: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(pictures, folder)
    whole = (folder / "down" / "001.png").read_bytes()
    (folder / "down" / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "down" / "empty.jpg").write_bytes(b"")
    (folder / "down" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "loose.png").write_bytes(whole)
    Image.new("RGB", (300, 300)).save(folder / "down" / "huge.png")
    frames = [picture("down", n) for n in (8, 9)]
    frames[0].save(folder / "down" / "moves.gif", save_all=True, append_images=frames[1:])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    audit = check(vision, folder).audit
    found = {each.id: (each.num_rows, each.rows, each.level) for each in audit.findings}
    assert found["broken-picture"] == (2, ("odd/down/broken.png", "odd/down/empty.jpg"), "warning")
    assert found["huge-picture"][:2] == (1, ("odd/down/huge.png",))
    assert found["missing-label"][:2] == (1, ("odd/loose.png",))
    assert found["animated-picture"][:2] == (1, ("odd/down/moves.gif",))
    assert found["converted-picture"][:2] == (1, ("odd/down/moves.gif",))
    rows = tmp_path / "r.jsonl"
    named = [{"image": str(folder / "down" / f"{n:03}.png"), "label": n % 2} for n in range(6)]
    rows.write_text("\n".join(json.dumps(row) for row in [*named, {"image": "no.png", "label": 1}]) + "\n")
    missing = next(each for each in check(vision, rows).audit.findings if each.id == "missing-picture")
    assert missing.rows == ("r.jsonl:7",) and "no.png: No such file" in missing.detail
    with pytest.raises(RowError, match=r"cannot identify image it$"):
        decode(b"no picture", "row")
    with pytest.raises(RowError, match="fractions"):
        decode(saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "row")


# ---- batches -------------------------------------------------------------------------------------


def test_pixels_are_those_of_the_models_own_processor(vision: Path, pictures: Path) -> None:
    from transformers import AutoImageProcessor

    rows = check(vision, pictures).train[:3]
    processor: Any = open_model(str(vision)).load_tokenizer()
    batch = collate_pictures(rows, processor)
    images = [Image.open(row.picture) for row in rows]
    theirs = AutoImageProcessor.from_pretrained(vision)(images=images, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch.pixel_values, theirs) and batch.document_lengths == (17,) * 3
    torch.manual_seed(4)
    drawn = [collate_pictures(rows, processor, "crop-flip").pixel_values for _ in range(2)]
    torch.manual_seed(4)
    assert torch.equal(collate_pictures(rows, processor, "crop-flip").pixel_values, drawn[0])
    assert not torch.equal(*drawn) and drawn[0].shape == theirs.shape
    flipped = collate_pictures(rows * 4, processor, "flip").pixel_values
    same = [torch.equal(a, b) for a, b in zip(flipped, theirs.repeat(4, 1, 1, 1), strict=True)]
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, theirs.repeat(4, 1, 1, 1), strict=True)]
    assert all(a or b for a, b in zip(same, mirrored, strict=True)) and any(mirrored) and any(same)


def test_random_parts_are_within_their_bounds() -> None:
    torch.manual_seed(0)
    boxes = np.array([random_part(80, 60) for _ in range(2000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 80).all() and (boxes[:, 3] <= 60).all()
    share, ratio = w * h / 4800, w / h
    assert share.min() > 0.07 and share.max() < 1.01 and 0.7 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.4
    assert abs(np.median(np.log(ratio))) < 0.08 and 0.4 < share.mean() < 0.56
    assert random_part(900, 10) == (443, 0, 456, 10) and math.isclose(13 / 10, 4 / 3, rel_tol=0.03)
