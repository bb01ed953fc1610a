"""Calibration text: whole windows, mixed with general text, never a validation row, and files that cannot serve."""

import json
from pathlib import Path

import pytest
import torch

from nybble.data import calibration_text as module
from nybble.data.calibration_text import calibration_text, general_text, read_calibration_file
from nybble.data.prepare import prepare
from nybble.data.template import ChatTemplate
from nybble.errors import DataError


@pytest.fixture(scope="module")
def template(tiny_model: Path) -> ChatTemplate:
    from nybble.sources.open import open_model

    return ChatTemplate(open_model(str(tiny_model)).load_tokenizer())


def documents(count: int, length: int = 100) -> list[torch.Tensor]:
    return [torch.full((length,), i, dtype=torch.int32) for i in range(count)]


def test_windows_are_whole_and_mixed(template: ChatTemplate) -> None:
    text = calibration_text(documents(200), "own", template, num_tokens=8 * 512 + 100, general_share=0.25)
    assert text.windows.shape == (8, 512) and text.windows.dtype == torch.int64
    assert text.description == "8 windows of 512 tokens: 6 from own, 2 of general text"
    assert (text.windows[:6] < 200).all()
    decoded = template.tokenizer.decode(text.windows[6:].flatten())
    assert decoded in general_text(0, 100_000)


def test_the_seed_decides(template: ChatTemplate) -> None:
    def windows(seed: int) -> torch.Tensor:
        return calibration_text(documents(50), "own", template, num_tokens=4096, seed=seed).windows

    assert torch.equal(windows(0), windows(0)) and not torch.equal(windows(0), windows(1))


def test_little_text_gives_fewer_windows_and_none_of_ones_own_all_general(template: ChatTemplate) -> None:
    text = calibration_text(documents(6), "own", template, num_tokens=8192)
    assert text.description == "9 windows of 512 tokens: 1 from own, 8 of general text"
    general = calibration_text([], "", template, num_tokens=2048)
    assert general.description == "4 windows of 512 tokens: 4 of general text"


def test_windows_fit_the_models_context(template: ChatTemplate) -> None:
    assert calibration_text(documents(9), "own", template, num_tokens=1024, context=64).windows.shape == (16, 64)


def test_less_than_a_window_is_refused(template: ChatTemplate) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl: 300 tokens in it\nneeded: at least one window of 512"):
        calibration_text(documents(3), "rows.jsonl", template, num_tokens=4096)


def test_a_python_without_general_text_says_so(template: ChatTemplate, monkeypatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pydoc_data"):
        calibration_text([], "", template, num_tokens=2048)


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS = [
    {"prompt": f"How much is {n} and {n}?", "completion": f"The sum of {n} and {n} is {2 * n}, as anybody can see."}
    for n in range(30)
]


def test_rows_are_rendered_as_training_renders_them(template: ChatTemplate, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", ROWS)
    found = read_calibration_file(source, template)
    data = prepare(source, template, max_seq_len=1024)
    trained = {tuple(row.input_ids.tolist()) for row in (*data.train, *data.validation)}
    assert {tuple(ids.tolist()) for ids in found} == trained


def test_no_more_rows_are_rendered_than_are_needed(template: ChatTemplate, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", ROWS)
    some = read_calibration_file(source, template, num_tokens=500)
    assert 500 <= sum(map(len, some)) < 700
    everything = {tuple(ids.tolist()) for ids in read_calibration_file(source, template)}
    assert {tuple(ids.tolist()) for ids in some} < everything


@pytest.mark.parametrize("max_seq_len", [1024, 90])
def test_validation_rows_in_it_are_named(template: ChatTemplate, tmp_path: Path, max_seq_len: int) -> None:
    source = write(tmp_path / "rows.jsonl", ROWS)
    data = prepare(source, template, max_seq_len=max_seq_len, validation_fraction=0.1)
    with pytest.raises(DataError, match="holds 3 of the validation rows") as caught:
        read_calibration_file(source, template, validation=data.validation)
    for row in data.validation:
        assert row.origin in str(caught.value)
    rest = write(tmp_path / "rest.jsonl", [ROWS[int(row.origin.split(":")[-1]) - 1] for row in data.train])
    assert len(read_calibration_file(rest, template, validation=data.validation)) == 27


def test_a_text_with_a_validation_answer_in_it_is_refused(template: ChatTemplate, tmp_path: Path) -> None:
    data = prepare(write(tmp_path / "rows.jsonl", ROWS), template, max_seq_len=1024)
    held_out = ROWS[int(data.validation[0].origin.split(":")[-1]) - 1]["completion"]
    text = tmp_path / "text.txt"
    text.write_text("Some words first.\n" + held_out.replace(" ", "\n") + "\nand then some.")
    with pytest.raises(DataError, match=f"text.txt: holds 1 of the validation rows: .*{data.validation[0].origin}"):
        read_calibration_file(str(text), template, validation=data.validation)
    text.write_text("Some words that no row holds.")
    assert len(read_calibration_file(str(text), template, validation=data.validation)) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "no text in it"),
        ("blank.md", b" \n \n", "no text in it"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("empty.jsonl", b"", "no rows in it"),
        ("missing.txt", None, "No such file"),
        ("unrendered.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}\n', "no row of it can be rendered"),
    ],
)
def test_files_that_cannot_serve(
    template: ChatTemplate, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_calibration_file(str(tmp_path / name), template)
    assert name in str(caught.value)
