"""A run that stopped goes on as if it had not, to the bit; and refuses to where it would not."""

import json
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import nybble
from rich.console import Console
from safetensors.torch import save_file
from short_runs import tensors_after
from tiny import make_data
from typed import typed

from nybble.cli.render import Terminal
from nybble.data import row_encoding
from nybble.errors import ModelError, RunError, TrainingError
from nybble.files.manifest import verify_manifest
from nybble.formats.quant_spec import BaseFormats
from nybble.options.option import config_to_yaml, fields_of
from nybble.options.verbs import TrainConfig, load_config
from nybble.planning import request as plan_module
from nybble.quantization.folder import quantize_folder
from nybble.runs.events import read_events
from nybble.runs.folder import RunFolder
from nybble.runs.result import RunResult
from nybble.sources.open import open_model
from nybble.training import checkpoint as checkpoint_module
from nybble.training import session
from nybble.training.checkpoint import Checkpoint
from nybble.training.events import Step
from nybble.training.objective import SupervisedFineTuning
from nybble.training.resume import settle_config
from nybble.training.rng import capture_rng, restore_rng
from nybble.training.session import train

STEPS = 5  # of 6 of 19 rows: the border of an epoch falls into the fourth
final = partial(tensors_after, step=STEPS)
PATHS: dict[str, dict[str, Any]] = {
    "blocks": {"micro_batch_size": 4, "keep": "everything"},
    "blocks, recomputed but one": {"micro_batch_size": 6, "keep": "nothing", "whole_blocks": 1},
    "generic, dropout": {"micro_batch_size": 2, "dropout": 0.2, "keep": "nothing"},
    "generic, padded, bf16": {"micro_batch_size": 3, "packing": False, "compute_dtype": "bf16"},
    "blocks, optimizer paged": {"micro_batch_size": 4, "page_optimizer": "always"},
}


def options(model: Path, data: Path, out: Path, **more: Any) -> dict[str, Any]:
    own = {"model": str(model), "data": str(data), "out": str(out), "max_steps": STEPS, "rows_per_step": 6}
    return own | {"rank": 4, "lr": 5e-3, "compute_dtype": "fp32", "save_every": 1, "keep_checkpoints": 99} | more


def run(config: TrainConfig) -> RunResult:
    return train(config)


def resume(out: Path, **more: Any) -> RunResult:
    return run(load_config(out / "config.yaml", {"out": str(out), "resume": True, **more}))


def losses(out: Path, kind: str) -> list[tuple[int, float]]:
    return [(event["step"], event["loss"]) for event in read_events(out / "events.jsonl", kind)]


@pytest.fixture(scope="module")
def plain(tiny_model, tmp_path_factory) -> Path:
    """A run of all steps that never stopped; tests take copies of it."""
    folder = tmp_path_factory.mktemp("plain")
    run(load_config(None, options(tiny_model, make_data(folder / "rows.jsonl"), folder / "run")))
    return folder / "run"


@pytest.fixture(scope="module")
def short(tiny_model, tmp_path_factory) -> Path:
    """A run of two steps; tests take copies of it."""
    folder = tmp_path_factory.mktemp("short")
    run(load_config(None, options(tiny_model, make_data(folder / "rows.jsonl"), folder / "run", max_steps=2)))
    return folder / "run"


@pytest.fixture(scope="module", params=PATHS)
def whole(request, tiny_model, tmp_path_factory) -> Path:
    """A run that never stopped, with a checkpoint of each step; evaluated after every second one."""
    folder = tmp_path_factory.mktemp("whole")
    data = folder / "rows.jsonl"
    rows = ({"prompt": f"Say {'so ' * (n % 7)}{n}.", "completion": f"{n}{'!' * (n % 5)}"} for n in range(20))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(load_config(None, options(tiny_model, data, folder / "run", eval_every=2, **PATHS[request.param])))
    return folder / "run"


# After each step on one path; elsewhere after one without an evaluation, and after one within the second epoch.
@pytest.mark.parametrize(
    ("whole", "step"),
    [(path, step) for path in PATHS for step in (range(1, STEPS + 1) if path == "blocks" else (3, 4))],
    indirect=["whole"],
)
def test_resumed_after_any_step_the_bytes_are_those_of_a_run_that_never_stopped(step, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(out / "checkpoints" / f"step-{later}")
    shutil.rmtree(out / "adapter")
    result = resume(out)
    assert final(out) == final(whole)
    assert losses(out, "step") == losses(whole, "step") and losses(out, "eval") == losses(whole, "eval")
    assert (result.loss_before, result.loss_after) == (losses(whole, "eval")[0][1], losses(whole, "eval")[-1][1])


def test_evaluations_in_between_change_nothing(whole, tmp_path):
    run(load_config(whole / "config.yaml", {"out": str(tmp_path / "run"), "eval_every": 1, "save_every": 5}))
    assert final(tmp_path / "run") == final(whole)


def test_with_another_amount_of_free_memory_the_run_goes_on_as_it_was_planned(tiny_model, data, tmp_path, monkeypatch):
    """Nothing is fixed by options, and either amount alone leads to another plan."""
    quantize_folder(open_model(str(tiny_model)), BaseFormats(), tmp_path / "base")
    measured = plan_module.this_machine

    def give(budget: int) -> None:
        monkeypatch.setattr(
            plan_module, "this_machine", lambda *given, **more: replace(measured(*given, **more), budget_bytes=budget)
        )

    def settled(out: Path) -> dict[str, Any]:
        return json.loads((out / "checkpoints" / f"step-{STEPS}" / "state.json").read_text())["settled"]

    budgets = {"scarce": 1, "plenty": 10**12}
    for name, budget in budgets.items():
        give(budget)
        run(load_config(None, options(tmp_path / "base", data, tmp_path / name)))
    for name, other in (("scarce", "plenty"), ("plenty", "scarce")):
        whole, out = tmp_path / name, tmp_path / f"{name} first"
        shutil.copytree(whole, out)
        for later in range(4, STEPS + 1):
            shutil.rmtree(out / "checkpoints" / f"step-{later}")
        give(budgets[other])
        resume(out)
        assert final(out) == final(whole)
        assert settled(out) == settled(whole)
    scarce, plenty = settled(tmp_path / "scarce"), settled(tmp_path / "plenty")
    differing = {name for name in scarce if scarce[name] != plenty[name]}
    assert differing >= {"keep", "micro_batch_size", "offload_activations"}, differing


def test_a_run_goes_on_with_the_blocks_that_a_gpus_plan_let_keep_everything(tmp_path):
    """Nothing asked for them: how many there are was chosen with what is kept, and is no longer once that is fixed."""
    config = load_config(None, options(tmp_path / "model", tmp_path / "data", tmp_path / "run"))
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    settled = {"keep": "attention", "whole_blocks": 3, "micro_batch_size": 2}
    memory = settle_config(Checkpoint(tmp_path, {}, {"settled": settled}), config).memory
    assert (memory.keep, memory.whole_blocks, memory.micro_batch_size) == ("attention", 3, 2)


def test_a_run_without_a_checkpoint_begins_anew(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    resume(tmp_path / "run")
    assert final(tmp_path / "run") == final(plain)


def test_rows_are_encoded_once_until_the_run_has_ended(plain, tmp_path, monkeypatch):
    """Not again when a run that was stopped before it trained is begun again, nor when one goes on."""
    monkeypatch.setattr(row_encoding, "MANY", 10)
    encode, out, seen = row_encoding.RowEncoder.__call__, tmp_path / "run", list[str]()
    monkeypatch.setattr(
        row_encoding.RowEncoder, "__call__", lambda own, row: seen.append(row.origin) or encode(own, row)
    )
    config = load_config(plain / "config.yaml", {"out": str(out)})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(session, "choose_base", interrupted)
        run(config)
    assert (out / ".starting" / "rows.partial" / "rows.bin").is_file() and seen
    seen.clear()
    stopped = train(config, lambda event: signal.raise_signal(signal.SIGINT) if isinstance(event, Step) else None)
    assert stopped.steps == 1 and (out / "rows" / "rows.bin").is_file() and not (out / ".starting").exists()
    resume(out)
    assert not seen and not (out / "rows").exists() and final(out) == final(plain)


def interrupted(*given: object) -> None:
    raise KeyboardInterrupt


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(plain, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(plain, out)
    newest = out / "checkpoints" / f"step-{STEPS}" / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    (out / "checkpoints" / f"step-{STEPS - 1}" / "nybble-manifest.json").unlink()
    train(load_config(out / "config.yaml", {"out": str(out), "resume": True}), Terminal(Console(width=1000)))
    printed = capsys.readouterr().out
    for words in (f"step-{STEPS} is not as", "optimizer.safetensors", f"step-{STEPS - 1} is not as", "nybble-manifest"):
        assert words in printed
    assert final(out) == final(plain)
    verify_manifest(newest.parent)


def test_no_whole_checkpoint_is_an_error_that_names_each(short, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(short, out)
    for step in (1, 2):
        (out / "checkpoints" / f"step-{step}" / "state.json").unlink()
    with pytest.raises(RunError, match=r"(?s)step-2.*step-1.*--overwrite"):
        resume(out)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config", r"lr was 0.005, is 0.001.*--allow-change config"),
        ("data", r"the first that differs is number \d+ \(rows.jsonl:4\).*--allow-change data"),
        ("base", r"another base model.*SHA-256 was .* is .*--allow-change base"),
    ],
)
def test_what_changed_is_refused_with_the_difference_unless_insisted_on(name, words, short, tiny_model, tmp_path):
    out, data = tmp_path / "run", make_data(tmp_path / "rows.jsonl")
    more: dict[str, Any] = {"data": str(data)}
    if name == "base":
        base = tmp_path / "base"
        shutil.copytree(tiny_model, base)
        run(load_config(None, options(base, data, out, max_steps=2)))
        shard = sorted(base.glob("*.safetensors"))[0]
        content = bytearray(shard.read_bytes())
        content[-2] ^= 1
        shard.write_bytes(content)
    else:
        shutil.copytree(short, out)
    if name == "config":
        more["lr"] = 1e-3
    if name == "data":
        lines = data.read_text().splitlines(keepends=True)
        lines[3] = json.dumps({"prompt": "Other?", "completion": "Other."}) + "\n"
        data.write_text("".join(lines))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=f"(?s){words}"):
        resume(out, **more)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    resume(out, allow_change=name, **more)
    if name == "config":
        assert load_config(out / "config.yaml", {}).loop.lr == 1e-3


def test_options_that_change_no_step_may_change(short, tmp_path):
    out, moved = tmp_path / "run", make_data(tmp_path / "moved.jsonl")
    shutil.copytree(short, out)
    resume(out, data=str(moved), save_every="5m", keep_checkpoints=1, eval_every=1)


def test_longer_training_goes_on_from_the_end_of_a_shorter(short, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(short, out)
    resume(out, max_steps=4, allow_change="config")
    assert [step for step, _ in losses(out, "step")] == [1, 2, 3, 4]


def test_other_micro_batches_may_be_insisted_on(tiny_model, data, tmp_path):
    out = tmp_path / "run"
    run(load_config(None, options(tiny_model, data, out, max_steps=2, micro_batch_size=6)))
    with pytest.raises(RunError, match="micro-batch-size was 6, is 2"):
        resume(out, micro_batch_size=2, max_steps=3)
    resume(out, micro_batch_size=2, max_steps=3, allow_change="config")
    state = json.loads((out / "checkpoints" / "step-3" / "state.json").read_text())
    assert state["settled"]["micro_batch_size"] == state["progress"]["micro_batch_size"] == 2


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(RunError, match="no run to go on with"):
        run(load_config(None, options(tmp_path, tmp_path, tmp_path, resume=True)))


@pytest.mark.parametrize("call", [1, 3, 5])  # the first and the last of a step, one within the next
def test_running_out_of_memory_in_a_micro_batch_repeats_the_step_with_smaller_ones(
    call, tiny_model, data, tmp_path, monkeypatch
):
    """In one of the micro-batches of two steps, and again once the optimizer's state was moved to a file."""
    calls = fail_at(monkeypatch, call, call + 1)
    out = tmp_path / "run"
    run(load_config(None, options(tiny_model, data, out, max_steps=3, micro_batch_size=2, dropout=0.2)))
    failed = (call - 1) // 3 + 1
    assert [step for step, _ in losses(out, "step")] == [1, 2, 3], "no step is lost, none is taken twice"
    first, second = read_events(out / "events.jsonl", "out-of-memory")
    assert (first["step"], first["paged"]) == (failed, True)
    assert (second["step"], second["micro_batch_size"]) == (failed, 1)
    assert calls[call + 1 :] == [1] * 6 * (4 - failed), "the same step again, and the rest of the run, a row at a time"


def test_out_of_memory_once_moves_the_optimizers_state_and_changes_no_bit(tiny_model, data, tmp_path, monkeypatch):
    """With dropout, whose draws are undone; a run that is resumed later pages no more than its options say."""
    adapters = {}
    for name, failing in {"whole": (), "early": (2,), "late": (5,)}.items():
        with monkeypatch.context() as patch:
            fail_at(patch, *failing)
            out = tmp_path / name
            run(load_config(None, options(tiny_model, data, out, max_steps=3, micro_batch_size=2, dropout=0.2)))
        adapters[name] = (out / "adapter" / "adapter_model.safetensors").read_bytes()
        assert len(list(read_events(out / "events.jsonl", "out-of-memory"))) == len(failing)
    assert adapters["early"] == adapters["late"] == adapters["whole"]


def fail_at(monkeypatch, *failing: int) -> list[int]:
    """What torch raises on the CPU, in the given micro-batches of a run; returns the rows of each one tried."""
    calls: list[int] = []
    original = SupervisedFineTuning.loss

    def fail(self, model, batch, denominator):
        calls.append(len(batch.rows))
        if len(calls) in failing:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")
        return original(self, model, batch, denominator)

    monkeypatch.setattr(SupervisedFineTuning, "loss", fail)
    return calls


def test_one_row_that_does_not_fit_stops_with_the_last_good_state(tiny_model, data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    config = load_config(None, options(tiny_model, data, out, save_every=99, micro_batch_size=1))
    run(config)
    expected = final(out)
    shutil.rmtree(out)
    original = SupervisedFineTuning.loss

    def fail_at_step_3(self, model, batch, denominator):
        if len(losses(out, "step")) == 2:
            raise MemoryError
        return original(self, model, batch, denominator)

    monkeypatch.setattr(SupervisedFineTuning, "loss", fail_at_step_3)
    with pytest.raises(TrainingError, match=r"(?s)Step 3 ran out of memory.*rows\.jsonl:\d+.*--resume"):
        run(config)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-2"]
    monkeypatch.setattr(SupervisedFineTuning, "loss", original)
    resume(out)
    assert final(out) == expected


def test_a_state_that_cannot_be_read_is_not_called_another_runs(tmp_path):
    class Unreadable:
        def load_state(self, read):
            read("num_steps")
            raise ModelError("the disk failed")

    save_file({"num_steps": torch.tensor(1)}, tmp_path / checkpoint_module.OPTIMIZER)

    class Restored:
        def restore(self, model, folder):
            pass

    with pytest.raises(ModelError, match="the disk failed"):
        checkpoint_module.Checkpoint(tmp_path, {}, {}).restore(None, Unreadable(), Restored(), None, None)


def test_the_random_generators_are_restored():
    import random

    import numpy as np

    def draw() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()

    draw()
    state = capture_rng(torch.device("cpu"))
    state = state._replace(numbers=json.loads(json.dumps(state.numbers)))
    first = draw()
    draw()
    restore_rng(state, torch.device("cpu"))
    assert draw() == first


def test_too_little_space_is_refused_before_the_first_step(tiny_model, data, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda path: full)
    with pytest.raises(RunError, match=r"(?s)1 MB free.*--keep-checkpoints"):
        run(load_config(None, options(tiny_model, data, tmp_path / "run")))


# ---- processes


def test_a_second_process_is_refused_and_sigterm_leaves_a_checkpoint(tiny_model, data, tmp_path):
    out = tmp_path / "run"
    train = ["train", "--model", tiny_model, "--data", data, "--out", out, "--rows-per-step", 2, "--max-steps", 100000]
    first = nybble(*train, "--eval-every", 100000, "--save-every", 100000, output=tmp_path / "first")
    first.wait_for(out / "events.jsonl", '"step"')
    for more in ([], ["--overwrite"], ["--resume"]):
        code, printed = nybble(*train, *more, output=tmp_path / "second").end()
        assert code == 2 and "Another process is training" in printed, printed
    with pytest.raises(RunError, match="Another process"), RunFolder(out).locked():
        pass
    os.kill(first.pid, signal.SIGTERM)
    code, printed = first.end()
    assert code == 128 + signal.SIGTERM, printed
    assert f"nybble train --resume --out {out}" in printed.replace("\n", "").replace("  nybble", " nybble")
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{losses(out, 'step')[-1][0]}"
    verify_manifest(checkpoint)
    with RunFolder(out).locked():
        pass


def test_the_command_line_resumes_with_no_other_argument(plain, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(plain, out)
    shutil.rmtree(out / "checkpoints" / f"step-{STEPS}")
    code, printed = nybble("train", "--resume", "--out", out, output=tmp_path / "printed").end()
    assert code == 0, printed
    assert final(out) == final(plain)


def test_resume_without_out_says_what_is_missing(tmp_path):
    result = typed(["train", "--resume"])
    assert result.exit_code == 2 and "--out" in result.stderr
    result = typed(["train", "--resume", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "no run to go on with" in result.stderr


def test_every_free_option_is_an_option():
    from nybble.training.resume import FREE_OPTIONS

    assert set(FREE_OPTIONS) <= set(fields_of(TrainConfig))


def test_rows_that_a_killed_overwrite_had_encoded_are_not_the_runs(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    run(load_config(None, options(tiny_model, data, folder.path, max_steps=1)))
    for rows in (folder.encoded, folder.starting.encoding):  # of the run, and of one that never began
        rows.mkdir(parents=True)
        (rows / "of").write_text(rows.name)
    result = run(
        load_config(None, options(tiny_model, data, folder.path, resume=True, max_steps=2, allow_change="config"))
    )
    assert result.steps == 2 and not folder.encoded.exists() and not folder.starting.path.exists()
