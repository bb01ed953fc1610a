"""What users and scripts rely on: the verbs, their flags, and the names `nybble` exports.

A change here is a change for users. When it is meant: `python tests/options/test_surface.py` rewrites surface.txt,
and CHANGELOG.md says what changed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import nybble
from nybble.cli.main import app

SURFACE = Path(__file__).with_name("surface.txt")


def verbs(command: Any, name: str = "nybble") -> Iterator[tuple[str, Any]]:
    """Each verb's full name and its click command, groups included."""
    yield name, command
    for verb, subcommand in getattr(command, "commands", {}).items():
        yield from verbs(subcommand, f"{name} {verb}")


def surface() -> str:
    lines = []
    for name, command in verbs(typer.main.get_command(app)):
        lines.append(name)
        for parameter in command.params:
            names = [*parameter.opts, *parameter.secondary_opts]
            lines.append(f"    {' '.join(names) if names[0].startswith('-') else f'[{names[0]}]'}")
    lines += ["exported names", *(f"    {name}" for name in sorted(getattr(nybble, "__all__", ["__version__"])))]
    return "\n".join(lines) + "\n"


def test_the_surface_is_the_committed_one() -> None:
    assert surface() == SURFACE.read_text(encoding="utf-8"), (
        "if this is meant, run: python tests/options/test_surface.py"
    )


def test_the_promised_flags_exist() -> None:
    promised = (
        "--model --tokenizer --data --out --max-steps --epochs --rows-per-step --micro-batch-size --max-seq-len --rank "
        "--alpha --dropout --target-modules --lr --schedule --warmup --seed --eval-every --save-every --device "
        "--overwrite --prompt-field --completion-field --messages-field --text-field --template --print-config"
    )
    train = dict(verbs(typer.main.get_command(app)))["nybble train"]
    flags = {flag for parameter in train.params for flag in parameter.opts}
    assert set(promised.split()) <= flags


if __name__ == "__main__":
    SURFACE.write_text(surface(), encoding="utf-8")
