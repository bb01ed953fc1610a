"""A few repetitions of each fault drill; `make drills` does hundreds."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from processes import program

DRILLS = Path(__file__).with_name("drills.py")


@pytest.mark.skipif(sys.platform != "linux", reason="the drills read /proc and fork a process that runs torch")
def test_kills_and_damage_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRILL_STEPS", "12")
    drills = ["kill", "damage"]
    if shutil.which("strace"):
        drills += ["syscalls", "io-errors"]
    code, printed = program(DRILLS, *drills, "--runs", 2, output=tmp_path / "printed").end(timeout=280)
    assert code == 0, printed[-2000:]
    reports = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert [report["drill"] for report in reports] == drills
