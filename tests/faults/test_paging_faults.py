"""A run that streams, pages and offloads meets failing disks and failing allocations.

Nothing is faked: files are shortened, descriptors lead to devices that fail, allocations exceed a real limit.
"""

import json
import os
import random
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import resume, tensors_after
from tiny import make_four_bit_model
from torch.utils._python_dispatch import TorchDispatchMode

from nybble.errors import RunError
from nybble.events import Event
from nybble.options.option import with_options
from nybble.options.verbs import load_config
from nybble.runs.events import EventLog, read_events
from nybble.runs.folder import RunFolder
from nybble.training.checkpoint import newest_checkpoint
from nybble.training.loop import paged_out
from nybble.training.optimizer import AdamW
from nybble.training.session import train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults are made through /proc")

STEPS = 6
final = partial(tensors_after, step=STEPS)
SPARING = {"stream_base": "always", "page_optimizer": "always", "offload_activations": "always"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synth") / "tiny"
    make_four_bit_model(folder)
    return folder


def run(model: Path, data: Path, out: Path, **more: Any) -> None:
    given = {"model": model, "data": data, "out": out, "max_steps": STEPS, "rank": 2, "rows_per_step": 4}
    given |= {
        "micro_batch_size": 2,
        "keep": "attention",
        "save_every": 1,
        "compute_dtype": "fp32",
        "threads": 1,
        "keep_checkpoints": 99,
        "eval_every": 99,
    }
    train(load_config(None, {key: str(value) for key, value in (given | more).items()}))


def scratch_files(out: Path) -> list[int]:
    """Descriptors of the nameless files that a run keeps in its folder, or beside it: the optimizer's first."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(link)
        except FileNotFoundError:  # the listing's own
            continue
        if target.startswith(str(out.parent)) and target.endswith("(deleted)"):
            found.append(int(link.name))
    return sorted(found, key=lambda number: os.fstat(number).st_size)


class AtStep(threading.Thread):
    """Does `what` once a run has ended its second step."""

    def __init__(self, out: Path, what: Callable[[], None]):
        super().__init__(daemon=True)
        self.events, self.what, self.done_at = out / "events.jsonl", what, float("inf")
        self.start()

    def run(self) -> None:
        while not (self.events.exists() and '"step": 2' in self.events.read_text()):
            time.sleep(0.0005)
        self.what()
        self.done_at = time.monotonic()


@pytest.mark.parametrize(
    ("file", "fault"),
    [
        ("optimizer", "fill"),
        pytest.param("optimizer", "fail", marks=pytest.mark.slow),
        pytest.param("optimizer", "shorten", marks=pytest.mark.slow),
        ("activations", "fail"),
        pytest.param("activations", "fill", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fails_ends_the_run_before_the_next_update(file, fault, model, data, tmp_path, disk):
    out = tmp_path / "run"

    def spoil() -> None:
        getattr(disk, fault)(scratch_files(out)[file == "activations"])

    spoiling = AtStep(out, spoil)
    words = {"fail": "Input/output error", "shorten": "has been shortened", "fill": "No space left"}[fault]
    with pytest.raises(RunError, match=words):
        run(model, data, out, **SPARING, max_steps=60)
    assert time.monotonic() - spoiling.done_at < 10
    problems: list[Event] = []
    checkpoint = newest_checkpoint(out / "checkpoints", problems.append)
    assert checkpoint is not None and not problems
    steps = [event["step"] for event in read_events(out / "events.jsonl", "step")]
    assert steps[-1] - checkpoint.step <= 1, "what failed was the next step, or the saving of this one"
    assert not [path.name for path in out.rglob("*") if path.name.startswith(".")]


def test_a_run_goes_on_to_the_same_bytes_once_the_disk_is_mended(model, data, tmp_path, disk):
    run(model, data, tmp_path / "whole", **SPARING)
    out = tmp_path / "run"
    AtStep(out, lambda: disk.fail(scratch_files(out)[0]))
    with pytest.raises(RunError, match="Input/output error"):
        run(model, data, out, **SPARING)
    resume(out)
    assert final(out) == final(tmp_path / "whole")


@pytest.mark.parametrize(("step", "bits"), [pytest.param(1, 32, marks=pytest.mark.slow), (4, 8)])
def test_resumed_while_all_is_paged_the_bytes_are_those_of_a_resident_run(step, bits, model, data, tmp_path):
    run(model, data, tmp_path / "resident", optimizer_bits=bits)
    out = tmp_path / "run"
    run(model, data, out, optimizer_bits=bits, **SPARING)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(out / "checkpoints" / f"step-{later}")
    shutil.rmtree(out / "adapter")
    resume(out)
    assert final(out) == final(tmp_path / "resident")
    plan = json.loads((out / "plan.json").read_text())["chosen"]
    assert plan["paged"] and plan["offloaded"] and plan["resident_blocks"] is not None


def test_moments_of_other_bits_are_refused(model, data, tmp_path):
    out = tmp_path / "run"
    run(model, data, out, max_steps=1)
    config = load_config(out / "config.yaml", {"out": str(out), "resume": True, "optimizer_bits": "8"})
    with pytest.raises(RunError, match="optimizer-bits was 32, is 8"):
        train(config)
    insisted = with_options(config, allow_change=("config",), max_steps=2)
    with pytest.raises(RunError, match=r"0.exp_avg is torch.float32 .*, here torch.uint8"):
        train(insisted)


class FailingAllocation(TorchDispatchMode):
    """The n-th operation, counted from the second step on, asks for more memory than the process may have."""

    def __init__(self, number: int, events: Path):
        super().__init__()
        self.number, self.count, self.events = number, 0, events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if self.count or (self.events.exists() and '"step"' in self.events.read_text()):
            self.count += 1
        if self.count == self.number:
            self.count += 1
            before = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (10_000_000, before[1]))
            try:
                torch.empty(1_000_000_000)
            finally:
                resource.setrlimit(resource.RLIMIT_DATA, before)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("seed", "streamed"),
    [(0, True), *[pytest.param(seed, seed % 2 == 0, marks=pytest.mark.slow) for seed in range(1, 8)]],
)
def test_an_allocation_that_fails_anywhere_in_a_micro_batch_costs_no_step_and_no_bit(
    seed, streamed, model, data, tmp_path
):
    options = {"stream_base": "always", "offload_activations": "always"} if streamed else {}
    run(model, data, tmp_path / "whole", **options)
    out = tmp_path / "run"
    number = random.Random(seed).randrange(100, 400)  # forward or backward of a micro-batch of the second step
    with FailingAllocation(number, out / "events.jsonl") as failing:
        run(model, data, out, **options)
    assert failing.count > number
    (event,) = read_events(out / "events.jsonl", "out-of-memory")
    assert event["paged"]
    assert [event["step"] for event in read_events(out / "events.jsonl", "step")] == list(range(1, STEPS + 1))
    assert final(out) == final(tmp_path / "whole")


def test_where_the_disk_has_no_room_for_the_moments_that_is_noted(tmp_path, disk):
    optimizer = AdamW([torch.zeros(1000)], beta1=0.9, beta2=0.99, weight_decay=0.0)
    events = EventLog(tmp_path / "events.jsonl")
    with disk.largest_file(1000):
        assert not paged_out(optimizer, RunFolder(tmp_path), events)
        assert not optimizer.paged
    (event,) = read_events(tmp_path / "events.jsonl", "not-paged")
    assert "File too large" in event["reason"]
    assert paged_out(optimizer, RunFolder(tmp_path), events) and optimizer.paged
