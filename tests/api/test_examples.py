"""The programs in examples/, on a tiny model."""

import importlib.util
import json
import runpy
import sys
import threading
from pathlib import Path
from typing import Any

import processes
import pytest

import nybble
from nybble.runs.events import read_events

EXAMPLES = Path(__file__).parents[2] / "examples"
BRIDGE = ("trainer", "sft", "dpo", "grpo")  # run in tests/bridge/test_trainers.py


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"finetune", "own_loop", "watch", *BRIDGE}


def test_finetune(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["finetune.py", str(tiny_model), str(data), str(tmp_path / "run")])
    runpy.run_path(str(EXAMPLES / "finetune.py"))
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("held-out loss: ") and shown[-1] in ("verified", "undecided")
    assert len((EXAMPLES / "finetune.py").read_text().splitlines()) <= 12


def test_a_loop_of_ones_own_gives_the_losses_of_nybble_train_to_the_bit(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    shared = {"max_steps": 3, "rank": 4, "lr": 5e-3}
    options = {"rows_per_step": 6, "micro_batch_size": 3, "keep": "everything", "quality": "absmax"}
    run = nybble.train(model=tiny_model, data=data, out=tmp_path / "run", max_seq_len=512, **shared, **options)
    own = module("own_loop").fine_tune(tiny_model, data, tmp_path / "own", rows=6, at_once=3, **shared)
    assert own == [event["loss"] for event in read_events(run.folder.events, "step")]
    written = [folder / "adapter_model.safetensors" for folder in (run.adapter, tmp_path / "own")]
    assert written[0].read_bytes() == written[1].read_bytes()


def test_watch_follows_another_process_from_its_first_event_to_its_last(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    out, events = tmp_path / "run", []
    watch = module("watch")
    follower = threading.Thread(target=lambda: events.extend(watch.follow(out, every_s=0.01)), daemon=True)
    follower.start()
    arguments = ["train", "--model", tiny_model, "--data", data, "--out", out, "--max-steps", 2]
    code, printed = processes.nybble(*arguments, output=tmp_path / "printed").end()
    assert code == 0, printed
    follower.join(30)
    assert events == [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert events[0]["event"] == "start" and events[-1]["event"] == "end"


def test_watch_tells_what_happens_in_its_own_run(
    tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module("watch").main([str(tiny_model), str(data), str(tmp_path / "run")])
    kinds = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert kinds[0] == "start" and kinds[-1] == "end" and kinds.count("step") == 20
