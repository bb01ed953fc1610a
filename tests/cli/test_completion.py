"""What a shell completes: by its protocol, in this process; and in a bash that has read the script."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typed import typed

SHELLS = ("bash", "zsh", "fish")


def completed(line: str, shell: str = "bash") -> list[str]:
    """What stands behind `line`, of which the last word is begun."""
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_TYPER_COMPLETE_ARGS": line}
    asked |= {"_NYBBLE_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    result = typed([], env=asked)
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    return result.stdout.split()


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("nybble expo", ["export"]),
        ("nybble data ch", ["check"]),
        ("nybble train --sched", ["--schedule"]),
        ("nybble train --format nf", ["nf4", "nf3", "nf2"]),
        ("nybble quantize --model m --format n", ["nf4", "nf3", "nf2"]),
        ("nybble train --optimizer-bits ", ["32", "8"]),
        ("nybble train --lr ", ["auto"]),
        ("nybble export --to g", ["gguf", "gguf-lora"]),
        ("nybble train --track wandb,t", ["wandb,trackio", "wandb,tensorboard"]),
        ("nybble train --track wandb,w", []),
        ("nybble plan --machine rtx-40", ["rtx-4060-ti-16gb", "rtx-4080", "rtx-4090"]),
        ("nybble train --data b", ["builtin:pydoc"]),
        ("nybble train --model all", ["all-minilm-l6-v2"]),
        ("nybble train --model models/", []),  # the shell completes paths by itself
        ("nybble train ru", []),
        ("nybble push ru", []),
        ("nybble train --out ru", []),
        ("nybble train --rank 4 --lr 1", []),
    ],
)
def test_flags_verbs_and_values(line: str, values: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert completed(line) == values


def test_names_come_with_the_paths_that_they_would_hide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.gguf").touch()
    (tmp_path / "smaller").mkdir()
    (tmp_path / ".smith").touch()
    (tmp_path / "other").touch()
    assert completed("nybble train --model sm") == ["smollm2-135m-instruct", "small.gguf", "smaller/"]


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shells_protocol(shell: str) -> None:
    found = " ".join(completed("nybble train --schedule c", shell))
    assert "constant" in found and "cosine" in found and "linear" not in found


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_has_a_script(shell: str) -> None:
    result = typed([], env={"_NYBBLE_COMPLETE": f"source_{shell}"})
    assert "_NYBBLE_COMPLETE=complete_" + shell in result.stdout, result.output
    if shutil.which(shell) is not None:
        checked = subprocess.run([shell, "-n"], input=result.stdout, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_after_reading_the_script(tmp_path: Path) -> None:
    """The script asks the program itself, in a process of its own."""
    (tmp_path / "script").write_text(typed([], env={"_NYBBLE_COMPLETE": "source_bash"}).stdout)
    typing = (
        "source ./script; COMP_WORDS=(nybble train --format n); COMP_CWORD=3; _nybble_completion nybble; "
        'printf "%s\\n" "${COMPREPLY[@]}"; complete -p nybble'
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", typing], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PATH": path}
    )
    *values, registered = done.stdout.split("\n")[:-1]
    assert values == ["nf4", "nf3", "nf2", "none"], done
    assert registered == "complete -o default -F _nybble_completion nybble", "paths are bash's own"
