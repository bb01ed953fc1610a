"""What the documents tell users to type works: commands parse, make's targets exist, links lead somewhere."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from nybble.cli.main import app
from nybble.options.verbs import load_config

PROJECT = Path(__file__).parents[1]
DOCUMENTS = [PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCUMENTS += sorted((PROJECT / "docs").glob("*.md"))
QUICK = ("--help", "--version", "--print-config", "doctor")


def shell_lines(document: Path) -> Iterator[str]:
    text = document.read_text(encoding="utf-8")
    for block in re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield line.strip().removeprefix("$ ")


def commands(program: str) -> list[list[str]]:
    """The arguments of each `program ...` line in the documents, redirections aside."""
    found = []
    for document in DOCUMENTS:
        for line in shell_lines(document):
            words = shlex.split(line.split(" > ")[0])
            if words[0].rpartition("/")[2] == program:
                found.append(words[1:])
    return found


def parse(command: Any, arguments: list[str]) -> None:
    """Parses `arguments` as the command line would, without running anything."""
    while getattr(command, "commands", None) and arguments and not arguments[0].startswith("-"):
        assert arguments[0] in command.commands, f"no verb {arguments[0]}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context("nybble", list(arguments))


@pytest.mark.parametrize("arguments", commands("nybble"), ids=shlex.join)
def test_nybble_commands_parse(arguments: list[str]) -> None:
    parse(typer.main.get_command(app), arguments)


def test_the_parser_here_refuses_what_nybble_would() -> None:
    with pytest.raises(typer.Exit):
        parse(typer.main.get_command(app), ["train", "--modle", "m"])
    with pytest.raises(AssertionError):
        parse(typer.main.get_command(app), ["trian"])


QUICK_COMMANDS = [arguments for arguments in commands("nybble") if any(word in QUICK for word in arguments)]


@pytest.mark.parametrize("arguments", QUICK_COMMANDS, ids=shlex.join)
def test_quick_commands_run(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "nybble", *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout and not done.stderr


PLANS = [arguments for arguments in commands("nybble") if arguments[0] == "plan"]


@pytest.mark.parametrize("arguments", PLANS, ids=shlex.join)
def test_plans_come_out_as_the_documents_say(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code in (0, 2), result.output  # 2: the plan says that nothing fits
    assert "strategy" in result.stdout
    for quoted in re.findall(r"[0-9.]+ [GM]B", quoted_output(arguments)):
        assert quoted in " ".join(result.stdout.split()) + result.stderr


def quoted_output(arguments: list[str]) -> str:
    """What a document says that a plan for a machine of the table prints; nothing for this machine."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for command, output in re.findall(
            r"^nybble ([^\n]*)\n```\n+gives\n+```\n(.*?)^```", text, re.MULTILINE | re.DOTALL
        ):
            if shlex.split(command) == arguments:
                return str(output)
    assert not any("-gpu" in word for word in arguments), "its figures are the same everywhere, so they can be quoted"
    return ""


def test_the_readme_quotes_every_verb() -> None:
    quoted = {arguments[0] for arguments in commands("nybble")}
    assert {command.name for command in app.registered_commands} <= quoted


@pytest.mark.parametrize("arguments", commands("make"), ids=shlex.join)
def test_make_targets_exist(arguments: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {word for word in arguments if "=" not in word} <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_within_the_project_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (document.parent / link).exists(), link


@pytest.mark.parametrize("path", sorted((PROJECT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_examples_are_complete_configs(path: Path) -> None:
    load_config(path, {})
