"""The check of a GPU, as far as it goes without one: a rehearsal, what it is compared with, what it says in words."""

import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the benchmarks read /proc")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu import correctness  # noqa: E402
from gpu.check import LLAMA_8B, Check, Load  # noqa: E402
from gpu.correctness import sound_kernels, test_results, what_is_lacking  # noqa: E402
from gpu.ideal import ideal_step  # noqa: E402
from gpu.measuring import idle_share  # noqa: E402
from gpu.report import card_name, tables_of  # noqa: E402
from gpu_check import PHASES, forget, run_phase  # noqa: E402

test_results.__test__ = False  # it is none
# What the machine that lends a card does not have; bitsandbytes takes seconds to import.
MISSING = ("pydantic", "datasets", "gguf", "rensa", "dill", "multiprocess", "bitsandbytes", "matplotlib")


def test_a_rehearsal_goes_through_all_phases_with_nothing_but_torch_and_transformers(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({MISSING!r}))\n")
    command = [sys.executable, BENCHMARKS / "gpu_check.py", "--device", "cpu", "--tiny", "--out", tmp_path / "out"]
    command += ["--seconds", 1800]  # on a busy machine
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "gpu-check.jsonl").read_text().splitlines()]
    found: dict[str, list[dict]] = {}
    for line in lines:
        found.setdefault(line["what"], []).append(line)
    assert [(line["phase"], line["result"]) for line in found["phase"]] == [(name, "ok") for name in PHASES]
    assert len(found["test"]) == 11 and len(found["product"]) == 13 and "cut" not in found
    assert [line["keep"] for line in found["step"]] == ["everything", "attention", "nothing"]
    for line in found["step"]:
        assert line["path"] == "blocks" and sum(line["ideal"].values()) > line["ideal"]["products"] > 0
        assert line["seconds"] > 0 and line["planned"] > 1e6 and line["idle"] == line["allocated"] == "needs a card"
    assert [line["rows"] for line in found["token"]] == [1, 8] and found["token"][0]["floor"] > 0
    assert [line["name"] for line in found["blocks"]] == ["resident", "streamed, inputs offloaded"]
    peers = {line["name"]: line for line in found["peer"]}
    assert peers.pop("transformers + PEFT + bitsandbytes")["result"] == "bitsandbytes: not installed"
    assert len(peers) == 2 and all(line["seconds"] > 0 for line in peers.values())
    assert "| 64 in rows of 32 | nothing | blocks |" in done.stdout and (tmp_path / "out" / "gpu-cpu.md").exists()


# Rounded to ms, as the design works them out: 4 x 2048 tokens.
@pytest.mark.parametrize(
    ("keep", "products", "attention", "small", "adapters", "all_of_it"),
    [
        ("everything", 308, 57, 39, 17, 437),
        ("attention", 413, 57, 53, 22, 560),
        ("nothing", 413, 72, 53, 22, 574),
    ],
)
def test_the_ideal_step_of_an_h100_is_the_designs(keep, products, attention, small, adapters, all_of_it):
    load, flops = Load(8192, 2048), 798e12
    shapes = LLAMA_8B.products | {"head": (LLAMA_8B.vocabulary, LLAMA_8B.hidden)}
    times = {name: (2 * load.tokens * rows * columns / flops,) * 2 for name, (rows, columns) in shapes.items()}
    work = 2 * load.tokens * load.row * LLAMA_8B.hidden
    parts = ideal_step(LLAMA_8B, load, keep, times, (work / 300e12, 2.5 * work / 260e12), 3e12)
    found = [parts[name] for name in ("products", "attention", "small ops", "adapters")]
    expected = [products, attention, small, adapters, all_of_it]
    assert [1e3 * seconds for seconds in (*found, sum(parts.values()))] == pytest.approx(expected, abs=0.6)


def fail(check):
    check.test("2 is 3", 1.0, 0.5)
    print("some words")
    raise RuntimeError("the card fell off the bus")


def hang(check):
    print("still here", flush=True)
    time.sleep(60)


def wrong(check):
    check.test("nothing is near NaN", math.nan, 1.0)


@pytest.mark.parametrize(
    ("phase", "result", "words"),
    [
        (fail, "failed", "RuntimeError: the card fell off the bus"),
        (hang, "out of time", "still here"),
        (wrong, "wrong", ""),
    ],
)
def test_what_becomes_of_a_phase_is_a_line(tmp_path, capsys, phase, result, words):
    check = Check("some", "cpu", True, tmp_path, ends=time.time() + (1 if phase is hang else 30))
    with capsys.disabled():  # its words go to the file that a process writes to
        assert run_phase(multiprocessing.get_context("fork"), phase, check) == result
    (line,) = check.lines("phase")
    assert (line["result"], line["last_words"]) == (result, words)


def test_phases_fit_into_the_time_there_is():
    assert sum(limit for _, limit in PHASES.values()) <= 450


def test_lines_of_phases_that_run_again_are_forgotten(tmp_path):
    for phase in ("facts", "step", "facts"):
        Check(phase, "cpu", True, tmp_path).say("x")
    forget(tmp_path / "gpu-check.jsonl", ["facts"])
    assert [line["phase"] for line in Check("", "cpu", True, tmp_path).lines("x")] == ["step"]


def test_the_card_is_idle_where_no_kernel_runs():
    assert idle_share([(6, 8), (0, 4), (1, 2), (3, 5)]) == pytest.approx(1 - 7 / 8)
    assert idle_share([]) is None


def test_kernels_that_fail_a_test_are_left_out_of_the_steps():
    text = """
tests/kernels/test_every_op.py::test_results_are_the_twins[rope_-triton-cuda] PASSED [  3%]
[gw1] [  9%] FAILED tests/kernels/test_every_op.py::test_results_are_the_twins[packed_attention-flash-cuda]
FAILED tests/kernels/test_every_op.py::test_results_are_the_twins[packed_attention-flash-cuda] - AssertionError
"""
    results = dict(test_results(text))
    assert list(results.values()) == [True, False]
    assert sound_kernels(results, "cuda") == ["triton", "bitsandbytes", "reference"]
    assert sound_kernels({"x[rope_-triton-cuda]": True}, "cuda") == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, None),
        ({"card": False}, "needs an NVIDIA card"),
        ({"capability": (7, 5)}, "compute capability 7.5; .* need 8.0"),
        ({"triton": False}, "pip install triton"),
        ({"memory": (3e9, 24e9)}, "Others use the card: 3.0 of 24.0 GB are free"),
        ({"memory": (7e9, 8e9)}, "too small for this check: it has 8.0 GB"),
        ({"memory": (7e9, 8e9), "tiny": True}, None),
    ],
)
def test_what_is_lacking_is_said_in_one_line_with_what_works(monkeypatch, tmp_path, changed, words):
    has = {"card": True, "capability": (9, 0), "triton": True, "memory": (70e9, 80e9), "tiny": False} | changed
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has["card"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: has["capability"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: has["memory"])
    monkeypatch.setattr(correctness, "util", SimpleNamespace(find_spec=lambda name: name if has["triton"] else None))
    said = what_is_lacking(Check("facts", "cuda", has["tiny"], tmp_path))
    assert (said is None) == (words is None)
    if said is not None:
        assert "\n" not in said and re.search(words, said)


def test_a_card_has_its_figures_in_the_report(tmp_path):
    facts, step = (Check(phase, "cuda", False, tmp_path) for phase in ("facts", "step"))
    facts.say("card", name="NVIDIA H200 NVL")
    figures = {"seconds": 0.6, "ideal": {"products": 0.4, "loss": 0.1}, "idle": 0.25, "launches": 1200, "waits": 1}
    memory = {"allocated": 20_000_000_000, "reserved": 21_000_000_000, "planned": 20_500_000_000}
    begin = {"tokens": 8192, "row": 2048, "path": "blocks"}
    step.say("step", **begin, keep="nothing", **figures, **memory, top_ms={"gemm<a|b>": 300.0})
    step.say("step", **begin, keep="everything", result="out of memory")
    step.say("peer", name="PEFT", tokens=8192, seconds=1.2, allocated=40_000_000_000, reserved=0)
    rows = {tuple(row[:2]): row for table in tables_of(step) for row in table.rows}
    assert rows["8192 in rows of 2048", "nothing"][2:] == [
        *("blocks", "600.0", "13653", "1.20", "1.50", "25%", "1200", "1", "20.00", "21.00", "20.50")
    ]
    assert rows["8192 in rows of 2048", "everything"][2] == "out of memory"
    assert rows["PEFT", "8192"][2:] == ["1200.0", "2.00", "40.00", "0.50"]
    assert rows["gemm<a/b>", "300.00"] and card_name(step) == "h200-nvl"
