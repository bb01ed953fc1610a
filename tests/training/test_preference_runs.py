"""Whole runs that learn from preferences, or from a teacher: stopped and resumed, paged and streamed to the same bytes;
references; events, report and card.
"""

import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from short_runs import resume, tensors_after
from tiny import make_data
from typed import typed

import nybble
from nybble.errors import ConfigError, RunError
from nybble.formats.quant_spec import BaseFormats
from nybble.options.verbs import load_config
from nybble.quantization.folder import quantize_folder
from nybble.runs.events import read_events
from nybble.sources.open import open_model
from nybble.training import reference
from nybble.training.session import train

PAIRS = [
    {"prompt": f"What is {n} plus {n}?", "chosen": f"It is {2 * n}.", "rejected": f"{n}{'?' * (n % 4)}"}
    for n in range(24)
]
STEPS = 3
final = partial(tensors_after, step=STEPS)
OBJECTIVES: dict[str, dict[str, Any]] = {
    **{"dpo": {}, "kto": {}, "ipo": {}, "simpo": {}, "orpo": {}, "reward": {}},
    "embed": {"text_field": "prompt,chosen,rejected"},
    **{"dpo, step": {"reference": "step"}, "kto, step": {"reference": "step"}},
    "distill": {"teacher_top_k": 9, "distill_temperature": 1.5},
}
TOLD = ("loss", "kl", "accuracy", "mrr")
EACH = [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("dpo", "distill"))) for name in OBJECTIVES]


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In four bits, so that it can be streamed."""
    folder = tmp_path_factory.mktemp("base") / "tiny-nf4"
    quantize_folder(open_model(str(tiny_model)), BaseFormats(), folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", PAIRS)


def run(model: Path, data: Path, out: Path, objective: str, **more: Any) -> Path:
    options = {"model": str(model), "data": str(data), "out": str(out), "objective": objective.partition(",")[0]}
    options |= {"max_steps": STEPS, "rows_per_step": 6, "micro_batch_size": 4, "rank": 4, "lr": 5e-3, "eval_every": 1}
    options |= {"compute_dtype": "fp32", "save_every": 1, "keep_checkpoints": 9, "validation_fraction": 0.2}
    train(load_config(None, options | OBJECTIVES.get(objective, {}) | more))
    return out


def told(out: Path, kind: str) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in event.items() if name in TOLD or "/" in name}
        for event in read_events(out / "events.jsonl", kind)
    ]


@pytest.mark.parametrize("objective", EACH)
def test_stopped_paged_or_streamed_the_bytes_are_the_same(
    objective: str, base: Path, pairs: Path, data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    distills = objective == "distill"
    rows, teacher = (data, {"teacher": str(tiny_model)}) if distills else (pairs, {})
    whole = run(base, rows, tmp_path / "whole", objective, **teacher)
    other = run(base, rows, tmp_path / "other", objective, page_optimizer="always", stream_base="always", **teacher)
    assert final(other) == final(whole)
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    for step in range(2, STEPS + 1):
        shutil.rmtree(stopped / "checkpoints" / f"step-{step}")
    resume(stopped)
    assert final(stopped) == final(whole)
    assert told(stopped, "step") == told(whole, "step") and told(stopped, "eval") == told(whole, "eval")
    steps = told(whole, "step")
    assert len(steps) == STEPS and all(math.isfinite(value) for step in steps for value in step.values())
    rewards, log_p = {"rewards/chosen", "rewards/rejected", "rewards/margins"}, {"logps/chosen", "logps/rejected"}
    own = {"reward": rewards, "embed": {"accuracy", "mrr"}, "distill": {"kl"}}
    metrics = own.get(objective, rewards | log_p)
    assert metrics <= steps[0].keys()
    assert (whole / "loss.png").stat().st_size > 0


@pytest.mark.slow
def test_stopped_while_the_reference_is_asked_a_run_goes_on(
    base: Path, pairs: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("nybble.data.row_records.ROWS_AT_ONCE", 4)
    whole = run(base, pairs, tmp_path / "whole", "dpo")
    original, calls = reference._asked, []

    def fail(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(reference, "_asked", fail)
    with pytest.raises(KeyboardInterrupt):
        run(base, pairs, tmp_path / "run", "dpo")
    asked = len(calls)
    resume(tmp_path / "run")
    assert final(tmp_path / "run") == final(whole)
    assert len(calls) - asked == 7 - 3, "what was asked is not asked again"


@pytest.mark.slow
def test_a_run_that_begins_with_an_adapter_is_compared_with_it(base: Path, pairs: Path, tmp_path: Path) -> None:
    """As TRL does with a copy of it; here it is asked before it moves. The bare base is another reference."""
    first = run(base, pairs, tmp_path / "first", "dpo")
    second = run(base, pairs, tmp_path / "second", "dpo", adapter=str(first / "adapter"))
    start, bare = told(second, "eval")[0], told(first, "eval")[-1]
    assert start["loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(start["rewards/margins"]) < 1e-5
    assert abs(bare["rewards/margins"]) > 1e-3
    with pytest.raises(ConfigError, match=r"reference is step(?s:.*)Leave --reference out"):
        run(base, pairs, tmp_path / "third", "dpo, step", adapter=str(first / "adapter"))
    shutil.rmtree(second / "checkpoints" / f"step-{STEPS}")
    (second / "reference").rename(second / "elsewhere")
    resume_refused = pytest.raises(
        RunError, match=r"does not say what the reference makes of \d+ rows(?s:.*)start a new run"
    )
    with resume_refused:
        resume(second)
    shutil.rmtree(second / "reference")
    (second / "elsewhere").rename(second / "reference")
    resume(second)


def test_the_report_tells_of_held_out_preferences(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    out = run(tiny_model, pairs, tmp_path / "run", "dpo", lr=2e-2)
    found = nybble.evaluate(out, answers=1).to_json()
    compared, last = found["preferences"], told(out, "eval")[-1]
    assert compared["tuned"]["loss"] == pytest.approx(last["loss"], rel=1e-3)
    assert compared["tuned"]["metrics"]["rewards/margins"] == pytest.approx(last["rewards/margins"], rel=1e-2, abs=1e-3)
    assert compared["base"]["loss"] == pytest.approx(math.log(2), abs=1e-4) and compared["kl"]["value"] > 0
    assert found["rows"] == compared["rows"], "the chosen answers are those to follow"
    assert "rewards/margins" in (out / "report" / "report.html").read_text()
    assert "| rewards/margins |" in (out / "adapter" / "README.md").read_text()


def test_the_command_line_checks_and_refuses(tiny_model: Path, pairs: Path, data: Path, tmp_path: Path) -> None:
    checked = typed(["data", "check", "--model", tiny_model, "--data", pairs, "--objective", "dpo", "--show", 1])
    assert checked.exit_code == 0 and "prompt/chosen/rejected" in checked.stdout
    for arguments, words in (
        (["--objective", "dpo", "--simpo-gamma", "1"], "simpo-gamma is 1.0, and objective is dpo"),
        (["--beta", "0.1"], "beta is 0.1, and objective is sft"),
        (["--objective", "dpo", "--data", data], "without a chosen and a rejected answer"),
    ):
        refused = typed(["train", "--model", tiny_model, "--data", pairs, "--out", tmp_path / "run", *arguments])
        assert refused.exit_code != 0 and words in " ".join((refused.output + str(refused.exception)).split())
