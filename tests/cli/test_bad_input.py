"""What goes wrong with models, data and folders reaches the user as one message, and touches no earlier run.

Each case runs the verb as typed, on a tiny model (conftest.py).
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typed import typed


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may damage."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def refusal(*arguments: object) -> str:
    """What is printed for a mistake, once it is sure that it is a message with the right exit code."""
    result = typed(arguments)
    assert isinstance(result.exception, SystemExit), f"an exception escaped: {result.exception!r}"
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ") and "Traceback" not in result.output
    return " ".join(result.stderr.split())


def train(model: object, data: object, out: Path, *more: object) -> str:
    message = refusal("train", "--model", model, "--data", data, "--out", out, "--max-steps", 1, *more)
    assert not (out / "adapter").exists()
    return message


def drop_config(model: Path) -> None:
    (model / "config.json").unlink()


def drop_shard(model: Path) -> None:
    next(iter(sorted(model.glob("*.safetensors")))).unlink()


def truncate_shard(model: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[-1]
    os.truncate(shard, shard.stat().st_size - 7)


def only_pickle(model: Path) -> None:
    for path in (*model.glob("*.safetensors"), *model.glob("*.index.json")):
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_config, ["config.json"]),
        (drop_shard, ["model-00001-of"]),
        (truncate_shard, ["model-0000"]),
        (only_pickle, ["pytorch_model.bin", "safetensors"]),
    ],
)
def test_a_damaged_model(
    damage: Callable[[Path], None], words: list[str], model: Path, data: Path, tmp_path: Path
) -> None:
    damage(model)
    message = train(model, data, tmp_path / "run")
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists(), "nothing is written for a run that cannot start"


def test_a_model_that_is_nowhere(data: Path, tmp_path: Path) -> None:
    assert "no/such-model" in train("no/such-model", data, tmp_path / "run")


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"Said by {role}."} for role in roles]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["rows.jsonl"]),
        ("", ["rows.jsonl", "no rows"]),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', ["rows.jsonl:2", "JSON"]),
        ('{"frage": "a", "antwort": "b"}\n', ["frage", "antwort", "messages", "--prompt-field"]),
        (json.dumps(turns("user")) + "\n", ["rows.jsonl:1", "assistant"]),
        (json.dumps(turns("assistant")) + "\n", ["rows.jsonl:1"]),
    ],
)
def test_data_that_cannot_be_trained_on(text: str | None, words: list[str], tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    if text is not None:
        data.write_text(text)
    for message in (
        train(tiny_model, data, tmp_path / "run"),
        refusal("data", "check", "--model", tiny_model, "--data", data),
    ):
        for word in words:
            assert word.lower() in message.lower()
    assert not (tmp_path / "run").exists()


def test_rows_whose_answers_would_all_be_cut_off(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    assert "rows.jsonl:1" in train(tiny_model, data, tmp_path / "run", "--max-seq-len", 8)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_an_earlier_run_is_refused_and_untouched(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model: m\n")
    (run / "events.jsonl").write_text('{"event": "step"}\n')
    before = contents(run)
    message = train(tiny_model, data, run)
    assert "already holds a run" in message and "--overwrite" in message
    (tmp_path / "broken.jsonl").write_text("{")
    train(tiny_model, tmp_path / "broken.jsonl", run, "--overwrite")  # an error before training began
    assert contents(run) == before


def test_a_folder_that_holds_something_else_is_refused_even_with_overwrite(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "photos"
    run.mkdir()
    (run / "holiday.jpg").write_bytes(b"precious")
    assert "no run" in train(tiny_model, data, run, "--overwrite")
    assert (run / "holiday.jpg").read_bytes() == b"precious"


def test_an_output_that_cannot_be_written(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "file" in train(tiny_model, data, tmp_path / "file")
    assert "file" in train(tiny_model, data, tmp_path / "file" / "below")


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs /proc, where even root may not write")
def test_an_output_on_a_file_system_that_refuses(tiny_model: Path, data: Path) -> None:
    assert "/proc" in train(tiny_model, data, Path("/proc/nybble-run"))


def test_quantize_refuses_a_folder_that_holds_files(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "out" in refusal("quantize", "--model", tiny_model, "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_chat_with_a_folder_that_holds_no_run(tmp_path: Path) -> None:
    assert "holds no run" in refusal("chat", "--run", tmp_path)


def test_data_check_shows_the_audit(tiny_model: Path, data: Path) -> None:
    result = typed(["data", "check", "--model", str(tiny_model), "--data", str(data), "--show", "1"])
    assert result.exit_code == 0, result.output
    assert "What is" in result.stdout and "40" in result.stdout

    result = typed(["data", "check", "--model", str(tiny_model), "--data", str(data), "--json"])
    audit = json.loads(result.stdout)
    assert audit["num_rows"] == 40 and audit["num_train"] + audit["num_validation"] == 40


def test_a_tokenizer_without_a_template_falls_back_and_says_so(model: Path, data: Path) -> None:
    (model / "chat_template.jinja").unlink()
    result = typed(["data", "check", "--model", str(model), "--data", str(data)])
    assert result.exit_code == 0, result.output
    assert "template" in result.stdout
