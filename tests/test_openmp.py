"""How threads wait is settled once, before torch is there, and said where it came too late."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest

from nybble import openmp

# What libgomp itself read: it prints its settings when it is loaded.
SHOWN = {"OMP_DISPLAY_ENV": "VERBOSE"}


def run(program: str, variables: Mapping[str, str] = {}) -> tuple[str, str]:
    """Standard output and error of a Python process whose environment says nothing else of waiting."""
    waiting = (*openmp.VARIABLES, *openmp.ALSO_SAID_BY)
    clean = {name: value for name, value in os.environ.items() if name not in waiting}
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean | variables, capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), done.stderr


SAY = "from nybble import openmp; print(openmp.waiting)"
DOCTOR = "import sys; sys.argv = ['nybble', 'doctor', '--json']; from nybble.cli.main import app; app()"


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP")
def test_the_command_line_settles_it_before_torch_is_loaded_and_the_library_reads_it() -> None:
    said, shown = run(DOCTOR, SHOWN)
    assert json.loads(said)["waiting"] == openmp.SENTENCES["asleep"]
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in shown and "GOMP_SPINCOUNT = '0'" in shown


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP")
def test_what_the_user_set_stays() -> None:
    (library,) = (Path(find_spec("torch").origin).parent / "lib").glob("libgomp*")
    said, shown = run(f"{SAY}; import ctypes; ctypes.CDLL({str(library)!r})", SHOWN | {"GOMP_SPINCOUNT": "77"})
    assert said == "given"
    assert "GOMP_SPINCOUNT = '77'" in shown
    assert run(SAY, {"OMP_WAIT_POLICY": "active"})[0] == "given"


def test_too_late_is_said_and_changes_nothing() -> None:
    program = "import os, torch; before = dict(os.environ); from nybble import openmp; "
    said, _ = run(f"{program}assert dict(os.environ) == before; {DOCTOR}")
    assert json.loads(said)["waiting"] == openmp.SENTENCES["unknown"]
    assert "import nybble first" in openmp.SENTENCES["unknown"]


def test_importing_nybble_brings_no_torch() -> None:
    assert run("import sys, nybble; print('torch' in sys.modules)")[0] == "False"
