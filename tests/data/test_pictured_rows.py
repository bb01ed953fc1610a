"""Pictures in conversations: the forms that rows have them in, and what is wrong with them."""

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import CHATML, byte_tokenizer
from tiny_multimodal import make_processor, picture, row_of, write_rows

from nybble.data.picture_reader import PicturedRow, PictureReader
from nybble.data.prepare import PreparedData, prepare
from nybble.data.readers import read_examples
from nybble.data.supervision import Learnt
from nybble.data.template import ChatTemplate

ANSWER = [{"role": "assistant", "content": "Red."}]


@pytest.fixture(scope="module")
def processor() -> Any:
    return make_processor("llava")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, colour in enumerate(("red", "green")):
        picture(colour, number).save(tmp_path / f"{colour}.png")
    return tmp_path


@pytest.fixture
def read(folder: Path, processor: Any) -> Any:
    """read(rows) -> PreparedData, by the template of LLaVA's kind."""

    def prepared(rows: list[Any], learnt: Learnt | None = None, reader: Any = "own", **more: Any) -> PreparedData:
        data = write_rows(folder / "rows.jsonl", rows)
        reader = PictureReader(lambda: processor) if reader == "own" else reader
        template = ChatTemplate(processor.tokenizer, "auto", processor.chat_template, (), learnt, reader)
        return prepare(str(data), template, max_seq_len=512, validation_fraction=0, **more)

    return prepared


def asked(content: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, *ANSWER], **columns}


def inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def test_every_form_of_a_picture_is_the_same_row(read: Any, folder: Path) -> None:
    text = {"type": "text", "text": " Which colour?"}
    parts = [
        {"image": "red.png"}, {"path": "red.png"}, {"url": str(folder / "red.png")}, {"image": {"path": "red.png"}},
        {"url": f"file://{folder}/red.png"}, {"image": inline(folder / "red.png")},
    ]  # fmt: skip
    rows = [asked([{"type": "image", **part}, text]) for part in parts]
    rows.append(asked([{"type": "image_url", "image_url": {"url": inline(folder / "red.png")}}, text]))
    rows.append(asked([{"type": "image"}, text], images=["red.png"]))
    rows.append(asked("<image> Which colour?", images=["red.png"]))
    rows.append(asked("<image> Which colour?", image="red.png"))
    rows.append(asked(" Which colour?", image="red.png"))  # no place for it: before the first words
    turns = [{"from": "human", "value": "<image> Which colour?"}, {"from": "gpt", "value": "Red."}]
    rows.append({"conversations": turns, "image": "red.png"})
    rows.append({"prompt": "<image> Which colour?", "completion": "Red.", "images": ["red.png"]})
    prompt = [{"role": "user", "content": [{"type": "image"}, text]}]
    pairs = {"prompt": prompt, "completion": ANSWER, "images": ["red.png"]}
    found: set[tuple[Any, ...]] = set()
    for own in (rows[:11], rows[11:12], rows[12:13], [pairs]):
        data = read(own, allow=())
        assert len(data.train) == len(own), data.audit.findings
        found |= {(tuple(row.input_ids.tolist()), row.pictures[0].digest) for row in data.train}
    assert len(found) == 1


def test_bytes_in_parquet_as_datasets_writes_them(folder: Path, processor: Any, read: Any) -> None:
    datasets = pytest.importorskip("datasets")
    pixels = [{"bytes": (folder / f"{colour}.png").read_bytes(), "path": None} for colour in ("red", "green")]
    columns = {"images": [pixels, pixels[:1]], "prompt": ["<image> or <image>?", "<image> Which?"]}
    rows = datasets.Dataset.from_dict(columns | {"completion": ["Red.", "Red."]})
    rows = rows.cast_column("images", datasets.Sequence(datasets.Image()))
    rows.to_parquet(folder / "rows.parquet")
    examples = read_examples(str(folder / "rows.parquet")).examples
    told = [[picture.stored for turn in example.turns() for picture in turn.pictures] for example in examples]
    assert told == [[each["bytes"] for each in pixels], [pixels[0]["bytes"]]]


def test_paths_are_from_the_folder_of_the_rows(read: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert len(read([asked("<image>?", image="red.png")]).train) == 1


def test_what_is_wrong_with_pictures_is_named(read: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:60])
    Image.new("L", (30, 20), 9).save(folder / "grey.png")
    frames = [Image.new("RGB", (9, 9), (n, 0, 0)) for n in (0, 200)]
    frames[0].save(folder / "moves.gif", save_all=True, append_images=frames[1:])
    wrong = [
        ("missing-picture", asked("<image> 1", image="nowhere.png")),
        ("broken-picture", asked("<image> 2", image="broken.png")),
        ("broken-picture", asked("<image> 3", image="data:image/png;base64,!!")),
        ("picture-url", asked("<image> 4", image="https://example.org/a.png")),
        ("picture-marks", asked("<image> <image> 5", image="red.png")),
        ("picture-marks", asked("<image> 6", images=["red.png", "green.png"])),
        ("picture-marks", asked([{"type": "image"}, {"type": "text", "text": "7"}])),
        ("template-loses-pictures", row_of(["red.png"], "<image>8", "a")),
        ("picture-in-answer", {"messages": [{"role": "user", "content": "9"}, {"role": "assistant", "content": [
            {"type": "image", "image": "red.png"}, {"type": "text", "text": "a"}]}]}),
        ("beyond-text", asked([{"type": "image", "image": "red.png"}, {"type": "audio", "audio": "a.wav"}])),
        ("missing-picture", asked("<image> 11", image="a\0b.png")),
        ("missing-picture", asked("<image> 12", image="~nosuchuser/a.png")),
        ("missing-picture", asked("<image> 13", image="a" * 5000)),
        ("broken-picture", asked("<image> 14", image="data:image/png;base64,é!!")),
        ("broken-picture", asked([{"type": "image", "bytes": "no base64"}, {"type": "text", "text": "15"}])),
        ("picture-marks", asked("<image> 16", images=[])),
        ("template-loses-pictures", asked("<image> 17")),
        ("template-loses-pictures", {"messages": [
            {"role": "user", "content": "18"}, {"role": "assistant", "content": "an <image> tag"}]}),
        ("missing-picture", asked("<image> 19", image="pipe.png")),
        ("broken-picture", asked("<image> 20", image="program.eps")),
    ]  # fmt: skip
    os.mkfifo(folder / "pipe.png")
    (folder / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    ran = folder / "gs"  # a Ghostscript that tells when it is started
    ran.write_text(f"#!/bin/sh\ntouch {folder}/started\n")
    ran.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    kept = [asked("<image> grey", image="grey.png"), asked("<image> gif", image="moves.gif")]
    kept += [asked(f"<image> {n}", image="red.png") for n in range(3)]
    audit = read([row for _, row in wrong] + kept).audit
    found = {each.id: each for each in audit.findings}
    named = {(each.id, row) for each in audit.findings for row in each.rows}
    for number, (name, _) in enumerate(wrong, 1):
        assert (name, f"rows.jsonl:{number}") in named, (name, audit.findings)
    assert max(len(each.detail) for each in audit.findings) < 400
    assert audit.num_train == len(kept) and audit.num_dropped == len(wrong)
    assert not (folder / "started").exists(), "nothing runs a program that came as a picture"
    assert "mode L 1" in found["converted-picture"].detail and found["animated-picture"].num_rows == 1


def test_what_parts_say_beside_their_picture_is_named(read: Any) -> None:
    """Sizes that a picture is to have, as Qwen's rows have them, and a second picture; not where its bytes are from."""
    said = {"max_pixels": 401408, "path": "green.png"}
    rows = [row_of(["red.png"], f"{n}", "a") for n in range(3)]
    for row, more in zip(rows, (said, {"detail": "high"}, {}), strict=True):
        row["messages"][0]["content"][0] |= more
    own = base64.b64encode(inline_bytes()).decode()
    rows.append(asked([{"type": "image", "path": "from.png", "bytes": own}, {"type": "text", "text": "4"}]))
    audit = read(rows).audit
    [found] = [each for each in audit.findings if each.id == "unread-message-keys"]
    assert found.rows == ("rows.jsonl:1",) and "max_pixels" in found.detail and "path" in found.detail
    assert audit.num_train == len(rows)


def inline_bytes() -> bytes:
    file = io.BytesIO()
    picture("blue").save(file, "PNG")
    return file.getvalue()


def test_a_picture_that_may_fill_memory_is_refused(read: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    found = {found.id for found in read([asked("<image>", image="red.png")]).audit.findings}
    assert {"huge-picture", "no-rows"} <= found


def test_a_model_that_reads_text_alone_says_so(read: Any) -> None:
    audit = read([asked("<image> Which?", image="red.png")], reader=None).audit
    (found,) = (each for each in audit.findings if each.id == "pictures-unread")
    assert found.level == "error" and found.rows == ("rows.jsonl:1",)
    audit = read([asked("<image> Which?", image="not there.png"), asked("Which?")], reader=None).audit
    assert [(found.id, found.level) for found in audit.findings if "picture" in found.id] == [
        ("pictures-unread", "error")
    ]


def test_a_template_that_leaves_pictures_out_is_refused(folder: Path, processor: Any) -> None:
    data = write_rows(folder / "rows.jsonl", [asked("<image> Which?", image="red.png")])
    blind = CHATML.replace(
        "{{ m.content }}",
        "{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}{% endif %}",
    )
    template = ChatTemplate(processor.tokenizer, "auto", blind, reader=PictureReader(lambda: processor))
    audit = prepare(str(data), template, max_seq_len=512, validation_fraction=0).audit
    assert any(found.id == "template-loses-pictures" and found.level == "error" for found in audit.findings)


def test_no_token_of_a_picture_is_learnt_under_train_on_all(read: Any, processor: Any) -> None:
    (row,) = read([asked("<image> Which?", image="red.png")], Learnt("all")).train
    of_picture = row.input_ids == processor.image_token_id
    assert isinstance(row, PicturedRow) and int(of_picture.sum()) == 16
    assert not bool((row.supervised & of_picture).any())
    assert processor.tokenizer.decode(row.input_ids[row.supervised]).startswith("<|im_start|>user\n Which?")


def test_rows_that_would_lose_a_picture_are_dropped(read: Any, folder: Path, processor: Any) -> None:
    rows = [asked("x " * 40 + "<image>", image="red.png"), asked("<image>", image="red.png")]
    data = write_rows(folder / "rows.jsonl", rows)
    template = ChatTemplate(
        processor.tokenizer, "auto", processor.chat_template, reader=PictureReader(lambda: processor)
    )
    prepared = prepare(str(data), template, max_seq_len=60, validation_fraction=0)
    assert [row.origin for row in prepared.train] == ["rows.jsonl:2"]
    assert any(found.id == "too-long" for found in prepared.audit.findings)


def test_a_prompt_has_the_pictures_before_its_answer(read: Any) -> None:
    turns = [
        *row_of(["red.png"], "This?", "Red.")["messages"],
        *row_of(["green.png", "red.png"], "These?", "Both.")["messages"],
    ]
    (row,) = read([{"messages": turns}]).train
    assert [len(each.pictures) for each in (row, row.prompt)] == [3, 1]
    assert row.prompt.input_ids.tolist() == row.prompt_ids


def test_the_same_question_of_two_pictures_is_no_duplicate(read: Any) -> None:
    audit = read([asked("<image> Which?", image=f"{colour}.png") for colour in ("red", "green", "red")]).audit
    (found,) = (each for each in audit.findings if each.id == "duplicates")
    assert found.rows == ("rows.jsonl:3",)


def test_templates_that_take_parts_alone_write_plain_rows_too(processor: Any) -> None:
    """As LLaVA's do, from whose text rows nothing was written before."""
    template = ChatTemplate(processor.tokenizer, "auto", processor.chat_template)
    plain = ChatTemplate(byte_tokenizer(290))
    from nybble.data.examples import Example

    example = Example("row", prompt="Hello?", completion="Hi.")
    (ours,), (theirs,) = template.encode_example(example), plain.encode_example(example)
    decode = processor.tokenizer.decode
    assert decode(ours.input_ids) == decode(theirs.input_ids) and decode(ours.answer_ids) == "Hi.<|im_end|>"


def test_bytes_and_paths_of_one_file_are_one_picture(folder: Path) -> None:
    file = io.BytesIO()
    picture("red").save(file, format="png")
    (folder / "same.png").write_bytes(file.getvalue())
    rows = [asked("<image>", image="same.png"), asked("<image>", image=inline(folder / "same.png"))]
    (folder / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    digests = [example.turns()[0].pictures[0].digest for example in read_examples(str(folder / "two.jsonl")).examples]
    assert digests[0] == digests[1]
