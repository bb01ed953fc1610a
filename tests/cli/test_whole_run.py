"""The verbs after one another, as a user types them: train, look into the run folder, chat, train again."""

import json
import math
from pathlib import Path

import pytest
import yaml
from typed import typed

from nybble.options.verbs import load_config


def run(*arguments: object) -> str:
    result = typed(arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run folder, and what was printed while it was made; options come from a file and from flags."""
    folder = tmp_path_factory.mktemp("finished")
    data, options = folder / "rows.jsonl", folder / "run.yaml"
    rows = [{"question": f"What is {n} plus {n}?", "reply": f"It is {2 * n}."} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options.write_text(yaml.safe_dump({"model": str(tiny_model), "data": str(data), "rank": 4, "max-steps": 99}))
    flags = ["--prompt-field", "question", "--completion-field", "reply", "--max-steps", 3, "--lr", "5e-3"]
    return folder / "run", run("train", options, "--out", folder / "run", "--rows-per-step", 4, *flags)


def events(run_folder: Path, kind: str) -> list[dict[str, float]]:
    lines = (run_folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_the_run_folder_holds_what_was_promised(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    for name in ("config.yaml", "events.jsonl", "loss.png", "data_audit.json", "plan.json"):
        assert (folder / name).stat().st_size > 0
    assert (folder / "adapter" / "adapter_config.json").exists()
    assert (folder / "adapter" / "adapter_model.safetensors").exists()

    config = load_config(folder / "config.yaml", {})
    assert (config.adapters.rank, config.loop.max_steps, config.loop.lr) == (4, 3, 5e-3)
    assert config.data.prompt_field == "question"


def test_the_events_are_the_documented_ones(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    steps = events(folder, "step")
    assert [step["step"] for step in steps] == [1, 2, 3]
    keys = "event step loss lr grad_norm tokens supervised_tokens step_s tokens_per_s memory_bytes"
    for step in steps:
        assert set(keys.split()) <= step.keys()
        assert math.isfinite(step["loss"]) and 0 < step["supervised_tokens"] < step["tokens"]
    validation = events(folder, "eval")
    assert validation[0]["step"] == 0 and validation[-1]["step"] == 3, "before the first step, and at the end"
    assert validation[-1]["loss"] < validation[0]["loss"]


def test_what_is_shown(finished: tuple[Path, str]) -> None:
    folder, shown = finished
    for word in ("supervised", "predicted memory", "base", "tuned", f"nybble chat --run {folder}"):
        assert word in shown.replace("\n", " ") or word in shown.replace("\n", "")


def test_chat_answers_one_prompt_the_same_each_time(finished: tuple[Path, str]) -> None:
    ask = ("chat", "--run", finished[0], "--prompt", "What is 3 plus 3?", "--max-new-tokens", 4)
    assert run(*ask) == run(*ask)


def test_overwrite_replaces_the_run(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.yaml").write_text("model: old\n")
    (folder / "events.jsonl").write_text('{"event": "step", "step": 1}\n' * 5)
    (folder / "adapter" / "old.safetensors").write_bytes(b"old")
    run("train", "--model", tiny_model, "--data", data, "--out", folder, "--max-steps", 1, "--overwrite")
    assert len(events(folder, "step")) == 1
    assert not (folder / "adapter" / "old.safetensors").exists()


@pytest.mark.parametrize("format", ["nf4", "nf3", "nf2"])
def test_a_quantised_folder_trains_and_chats_too(format: str, tiny_model: Path, data: Path, tmp_path: Path) -> None:
    run("quantize", "--model", tiny_model, "--out", tmp_path / "few-bits", "--format", format)
    assert format in (tmp_path / "few-bits" / "config.json").read_text()
    run("train", "--model", tmp_path / "few-bits", "--data", data, "--out", tmp_path / "run", "--max-steps", 1)
    assert math.isfinite(events(tmp_path / "run", "eval")[-1]["loss"])
    run("chat", "--run", tmp_path / "run", "--prompt", "What is 3 plus 3?", "--max-new-tokens", 2)


def test_adapters_that_begin_with_the_error_train_resume_and_chat(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    flags = ["--model", tiny_model, "--data", data, "--format", "nf2", "--max-seq-len", 128]
    flags += ["--max-steps", 2, "--rows-per-step", 4, "--calibration-tokens", 512]
    for init in ("default", "loftq", "activation"):
        run("train", *flags, "--out", tmp_path / init, "--init", init)
        assert (tmp_path / init / "adapter" / "initial.safetensors").is_file() == (init != "default")
    begun = {events(tmp_path / init, "eval")[0]["loss"] for init in ("default", "loftq", "activation")}
    assert len(begun) == 3
    for init in ("loftq", "activation"):
        run("chat", "--run", tmp_path / init, "--prompt", "What is 3 plus 3?", "--max-new-tokens", 2)


def test_mixed_formats_train_and_chat(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    flags = ["--model", tiny_model, "--data", data, "--mixed", 3.2, "--max-steps", 1]
    shown = run("train", *flags, "--out", tmp_path / "run")
    assert "bits of each layer: 3." in shown
    layers = json.loads((tmp_path / "run" / "formats.json").read_text())["layers"]
    assert set(layers.values()) <= {"nf4", "nf3", "nf2"} and len(set(layers.values())) > 1
    run("chat", "--run", tmp_path / "run", "--prompt", "What is 3 plus 3?", "--max-new-tokens", 2)
