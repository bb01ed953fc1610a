"""A few repetitions of each fault drill; `make drills` does hundreds."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DRILLS = Path(__file__).with_name("drills.py")


@pytest.mark.skipif(sys.platform != "linux", reason="the drills read /proc and fork a process that runs torch")
def test_kills_and_damage_a_few_times() -> None:
    drills = ["kill", "damage"]
    if shutil.which("strace"):
        drills += ["syscalls", "io-errors"]
    done = subprocess.run([sys.executable, str(DRILLS), *drills, "--runs", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [report["drill"] for report in reports] == drills
