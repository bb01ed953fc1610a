"""Whole distilled runs: what is kept of the teacher, interrupted and gone on with; teachers in every form; refusals."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from short_runs import resume, tensors_after
from tiny import SMALL, byte_tokenizer, make_data
from tiny_gguf import VOCABULARY, write_model
from transformers import LlamaConfig, LlamaForCausalLM
from typed import typed

import nybble
from nybble.errors import ConfigError, PlanError, RunError
from nybble.events import Event
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.options.verbs import load_config
from nybble.planning import asked
from nybble.planning.report import Planned
from nybble.quantization.folder import quantize_folder
from nybble.runs.events import read_events
from nybble.sources.open import open_model
from nybble.training.events import TeacherAsked
from nybble.training.session import train
from nybble.training.teacher import Taught

STEPS = 3
final = partial(tensors_after, step=STEPS)


def distil(student: Path, teacher: Path, data: Path, out: Path, listen: list[Event] | None = None, **more: Any) -> Path:
    options: dict[str, Any] = {"model": str(student), "teacher": str(teacher), "data": str(data), "out": str(out)}
    options |= {"objective": "distill", "max_steps": STEPS, "rows_per_step": 6, "rank": 4, "lr": 5e-3, "eval_every": 1}
    options |= {"compute_dtype": "fp32", "save_every": 1, "keep_checkpoints": 9, "validation_fraction": 0.2}
    options = {name: value for name, value in (options | more).items() if value is not None}
    train(load_config(None, options), (listen if listen is not None else []).append)
    return out


@pytest.fixture(scope="module")
def four_bit(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four-bit") / "tiny-nf4"
    quantize_folder(open_model(str(tiny_model)), BaseFormats(), folder)
    return folder


def test_a_run_learns_its_teachers_distributions_and_keeps_them(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted while the teacher is asked, it goes on where it was; on resume nothing is asked again; what changed
    is named.
    """
    monkeypatch.setattr("nybble.data.row_records.ROWS_AT_ONCE", 4)
    options: dict[str, Any] = {"format": "nf2", "quality": "absmax", "distill_alpha": 1.0}
    told: list[Event] = []
    whole = distil(tiny_model, tiny_model, data, tmp_path / "whole", told, **options)
    before, *_, last = read_events(whole / "events.jsonl", "eval")
    assert before["loss"] == pytest.approx(before["kl"], rel=1e-6) and last["kl"] < 0.9 * before["kl"]
    assert 0 <= last["agreement"] <= 1 and last["cross_entropy"] > 0
    (recorded,) = read_events(whole / "events.jsonl", "teacher")
    assert recorded["format"] == "none" and recorded["rows"] == 18 + 8
    kinds = [type(event) for event in told]
    assert kinds.index(TeacherAsked) < kinds.index(Planned), "it is gone before the student comes"

    answers, calls = Taught._answers, []

    def fail(self: Taught, model: Any, rows: Any) -> Any:
        calls.append(rows)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return answers(self, model, rows)

    monkeypatch.setattr(Taught, "_answers", fail)
    with pytest.raises(KeyboardInterrupt):
        distil(tiny_model, tiny_model, data, tmp_path / "again", **options)
    calls.clear()
    monkeypatch.setattr(Taught, "_answers", lambda *given: calls.append(given) or answers(*given))
    distil(tiny_model, tiny_model, data, tmp_path / "again", **options)
    assert len(calls) == 7 - 3 and final(tmp_path / "again") == final(whole)
    assert (tmp_path / "again" / "teacher" / "rows.bin").read_bytes() == (whole / "teacher" / "rows.bin").read_bytes()

    found = nybble.evaluate(whole, answers=1, compute_dtype="fp32").to_json()["distillation"]
    assert found["tuned"]["metrics"]["kl"] == pytest.approx(last["kl"], rel=1e-3) and found["rows"] == 8
    assert found["base"]["metrics"]["kl"] == pytest.approx(before["kl"], rel=1e-3) and found["kl"]["value"] > 0
    assert "Distillation" in (whole / "report" / "report.html").read_text()
    assert "| agreement |" in (whole / "adapter" / "README.md").read_text()

    calls.clear()
    shutil.rmtree(whole / "checkpoints" / f"step-{STEPS}")
    resume(whole)
    assert not calls and final(whole) == final(tmp_path / "again")
    shutil.rmtree(whole / "checkpoints" / f"step-{STEPS}")
    with pytest.raises(RunError, match="teacher-top-k was None, is 5"):
        resume(whole, teacher_top_k=5)
    about = whole / "teacher" / "about.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"teacher": "0" * 64}) + "\n")
    with pytest.raises(RunError, match="began with another teacher: teacher was 0000"):
        resume(whole)
    resume(whole, allow_change="base")
    assert len(calls) == 7


FORMS: dict[str, dict[str, Any]] = {
    "streamed": {},
    "nf4": {"teacher_format": "nf4"},
    "padded": {"packing": False},
    "bf16": {"compute_dtype": "bf16"},
    "head": {"modules_to_save": "lm_head", "lr": 2e-4},
    "limited": {"memory": "2GB"},
    "gguf": {"template": "none"},
    "full": {"method": "full", "rank": None, "format": "none", "quality": None, "lr": 2e-4},
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_teachers_and_students_in_other_forms(
    form: str, tiny_model: Path, four_bit: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"format": "nf2", "quality": "absmax", "distill_alpha": 1.0} | FORMS[form]
    student, teacher = tiny_model, four_bit if form == "streamed" else tiny_model
    if form == "gguf":
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SMALL | {"vocab_size": VOCABULARY}))
        student = teacher = write_model(tmp_path / "m.gguf", model, "llama", "Q8_0")
    if form == "full":
        teacher = tmp_path / "tiny-nf2"
        quantize_folder(open_model(str(tiny_model)), BaseFormats(QuantSpec("nf2")), teacher)
    resident = distil(student, teacher, data, tmp_path / "resident", **options)
    before, *_, last = read_events(resident / "events.jsonl", "eval")
    assert last["kl"] < before["kl"]
    (told,) = read_events(resident / "events.jsonl", "teacher")
    in_few_bits = dict.fromkeys(("streamed", "full", "gguf"), "stored") | {"nf4": "nf4"}
    assert told["format"] == in_few_bits.get(form, "none")
    if form == "streamed":
        ways = asked._ways
        monkeypatch.setattr(asked, "_ways", lambda *given: [way for way in ways(*given) if way[1].resident_blocks == 0])
        distil(tiny_model, teacher, data, tmp_path / "streamed", **options)
        rows = [(tmp_path / name / "teacher" / "rows.bin").read_bytes() for name in ("resident", "streamed")]
        assert rows[0] == rows[1]


@pytest.mark.slow
def test_killed_while_its_teacher_is_asked_a_run_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    data = make_data(
        tmp_path / "many.jsonl", [{"prompt": f"{n} + {n}?", "completion": f"{2 * n}."} for n in range(400)]
    )
    options: dict[str, Any] = {"rows_per_step": 100, "format": "nf2", "quality": "absmax", "validation_rows": 8}
    options |= {"max_seq_len": 64}
    whole = distil(tiny_model, tiny_model, data, tmp_path / "whole", **options)
    out, config = tmp_path / "killed", tmp_path / "config.yaml"
    config.write_text((whole / "config.yaml").read_text())
    process = processes.nybble("train", config, "--out", out, output=tmp_path / "printed")
    partial = out / ".starting" / "teacher.partial" / "rows.bin"
    while not partial.exists() or partial.stat().st_size < 20_000:
        assert process.exit_code is None, process.printed
    os.kill(process.pid, signal.SIGKILL)
    process.end()
    known = partial.stat().st_size
    assert known < (whole / "teacher" / "rows.bin").stat().st_size
    distil(tiny_model, tiny_model, data, out, **options)
    (told,) = read_events(out / "events.jsonl", "teacher")
    assert 0 < told["rows"] < 308, "what was said before is not asked again"
    assert (out / "teacher" / "rows.bin").read_bytes() == (whole / "teacher" / "rows.bin").read_bytes()
    assert final(out) == final(whole)


def test_what_cannot_be_is_said(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    byte_tokenizer(300).save_pretrained(other)
    with pytest.raises(ConfigError, match=r"(?s)is read as .* there.*Choose a teacher of the same family"):
        distil(tiny_model, other, data, tmp_path / "run")
    for arguments, words in (
        (["--objective", "distill"], "objective is distill, and there is no teacher"),
        (["--teacher", tiny_model], "and objective is sft"),
        (["--objective", "distill", "--teacher", tiny_model, "--label-smoothing", "0.1"], "label-smoothing is 0.1"),
        (["--objective", "distill", "--teacher", tiny_model, "--z-loss", "0.1"], "z-loss is 0.1"),
        (["--objective", "distill", "--teacher", tiny_model, "--distill-alpha", "0"], "distill-alpha"),
    ):
        refused = typed(["train", "--model", tiny_model, "--data", data, "--out", tmp_path / "run", *arguments])
        assert refused.exit_code != 0 and words in " ".join((refused.output + str(refused.exception)).split())


def test_a_plan_counts_the_teacher(tiny_model: Path, data: Path) -> None:
    options: dict[str, Any] = {"model": str(tiny_model), "objective": "distill", "compute_dtype": "fp32"}
    options |= {"max_seq_len": 128, "memory": "3GB", "max_steps": 4, "rows_per_step": 2}
    fits = nybble.plan(**options, teacher="smollm2-135m")
    fits.check()
    told = fits.to_json()["teacher"]
    assert told["format"] == "none" and told["tokens"] == 4 * 2 * 128 and told["seconds"] > 0
    assert told["file_bytes"] == 1024 * (64 * 6 + 2) + 8 * 24 and sum(told["components"].values()) == told["peak_bytes"]
    assert "smollm2-135m: 16 bits" in str(fits) and told["peak_bytes"] > 4 * 134e6, "its weights, in fp32"
    by_rows = nybble.plan(**options | {"max_steps": None}, teacher="smollm2-135m", data=str(data)).to_json()["teacher"]
    assert 0 < by_rows["tokens"] < 40 * 128
    # What this process holds already is part of every peak, and differs from run to run of the tests.
    squeeze = f"{(told['peak_bytes'] - 100e6) / 1e9:.3f}GB"
    squeezed = nybble.plan(**options | {"memory": squeeze}, teacher="smollm2-135m").to_json()["teacher"]
    assert squeezed["format"] == "nf4" and squeezed["fits"]
    with pytest.raises(PlanError, match=r"(?s)smallest way to ask the teacher, llama-3-8b.*nybble quantize --model"):
        nybble.plan(**options, teacher="llama-3-8b").check()
    with pytest.raises(ConfigError, match="teacher-format is stored, and smollm2-135m is in 16 bits"):
        nybble.plan(**options, teacher="smollm2-135m", teacher_format="stored")
