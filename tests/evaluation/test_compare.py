"""`nybble compare`: equal rows, honest figures, what does not fit is left out, what is finished stays."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from processes import nybble as nybble_process
from safetensors.torch import load_file
from tiny import make_data
from typed import typed

import nybble
from nybble.cli import method_process
from nybble.errors import ConfigError
from nybble.evaluation import compare_methods
from nybble.evaluation.compare_methods import MethodResult
from nybble.runs.events import read_events

METHODS = "full,lora,nf4:absmax"


@pytest.fixture
def in_process(monkeypatch):
    """Methods train in this process, which has everything imported; (name, whether it goes on) of those that did."""
    trained = []

    def train(name, settings, log, run, steps, resumes, interrupt, report):
        trained.append((name, resumes))
        return method_process.main(settings, resumes)

    monkeypatch.setattr(compare_methods, "_train", train)
    return trained


def options(tiny_model: Path, data: Path, out: Path, **more):
    own = {"model": tiny_model, "data": data, "out": out, "methods": METHODS, "max_steps": 3, "rows_per_step": 4}
    return own | {"compute_dtype": "fp32", "rank": 2, "lr": 5e-3, "full_lr": 5e-3, "validation_rows": 8} | more


def words(given):
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_methods_are_compared_over_the_same_rows_and_finished_ones_stay(tiny_model, data, tmp_path, in_process):
    given = options(tiny_model, data, tmp_path / "out")
    found = nybble.compare(**given)
    assert [result.method for result in found.results] == METHODS.split(",") == [name for name, _ in in_process]
    full, lora, qlora = found.results
    assert full.tokens == lora.tokens == qlora.tokens > 0
    assert full.loss_before == pytest.approx(lora.loss_before, rel=1e-4) and full.retention == pytest.approx(1)
    share = (full.loss_before - qlora.loss_after) / (full.loss_before - full.loss_after)
    assert qlora.retention == pytest.approx(share)
    for result in found.results:  # figures are those of the run itself
        run = nybble.open_run(result.run)
        steps = list(read_events(Path(result.run) / "events.jsonl", "step"))
        assert len(steps) == 3 and result.tokens == sum(step["tokens"] for step in steps)
        assert (result.loss_before, result.loss_after) == (run.loss_before, run.loss_after)
        tensors = load_file(next(run.trained.glob("*model.safetensors")))
        assert result.artefact_bytes > sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert not (Path(result.run) / "checkpoints").exists()
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [each["method"] for each in record["methods"]] == METHODS.split(",") and record["left_out"] == []
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000
    shutil.rmtree(full.run)  # as if it had never been
    again = nybble.compare(**given)
    assert in_process[3:] == [("full", False)], "what is finished is not trained again"
    assert again.results[1:] == found.results[1:]
    assert again.results[0].loss_after == found.results[0].loss_after
    with pytest.raises(ConfigError, match="another max-steps: 3 and not 4"):
        nybble.compare(**given | {"max_steps": 4})
    shown = typed(["compare", *words(given)])
    assert shown.exit_code == 0 and "100%" in shown.output and len(in_process) == 4


def test_what_does_not_fit_is_left_out_with_its_bytes(tiny_model, data, tmp_path, in_process):
    found = nybble.compare(**options(tiny_model, data, tmp_path / "out", memory="60MB", methods="full,lora"))
    assert not found.results and not in_process
    assert [left.method for left in found.left_out] == ["full", "lora"]
    assert all(left.planned_bytes > 60e6 and "too many" in left.reason for left in found.left_out)


def test_an_error_of_a_method_is_said_and_the_others_go_on(tiny_model, data, tmp_path, monkeypatch):
    def train(name, settings, log, run, steps, resumes, interrupt, report):
        log.write_text("The disk is full.\n")
        return 2

    monkeypatch.setattr(compare_methods, "_train", train)
    found = nybble.compare(**options(tiny_model, data, tmp_path / "out"))
    assert [left.reason for left in found.left_out] == ["it ended with 2: The disk is full."] * 3


def test_without_a_gain_of_full_fine_tuning_nothing_is_retained():
    result = MethodResult("full", 1e-5, 1, 1, 1.0, 1.0, 1, 2.0, 2.1, 1, "run")
    assert compare_methods._with_retention([result])[0].retention is None


@pytest.mark.parametrize("methods", ["nf5:absmax", "qlora", "nf4:often"])
def test_an_unknown_method_is_refused(methods, tiny_model, data, tmp_path):
    with pytest.raises(ConfigError, match="Allowed: full, lora"):
        nybble.compare(**options(tiny_model, data, tmp_path / "out", methods=methods))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_interrupted_it_goes_on_in_the_same_run(tiny_model, tmp_path):
    """In processes of their own: the method at work saves, and the same command takes it up."""
    data = make_data(tmp_path / "rows.jsonl")
    given = options(tiny_model, data, tmp_path / "out", methods="lora", max_steps=200)
    process = nybble_process("compare", *words(given), output=tmp_path / "printed")
    log = tmp_path / "out" / "lora" / "events.jsonl"
    process.wait_for(log, '"event": "step"')
    os.kill(process.pid, signal.SIGINT)
    code, printed = process.end()
    assert code == 130 and "the same command goes on" in printed
    assert 0 < len(list(read_events(log, "step"))) < 200
    assert list((tmp_path / "out" / "lora" / "checkpoints").glob("step-*"))
    found = nybble.compare(**given)
    assert [event["step"] for event in read_events(log, "step")] == list(range(1, 201))
    assert [result.method for result in found.results] == ["lora"]
