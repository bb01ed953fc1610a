"""What the documents tell users to type works: each block of commands or Python is run, on a tiny model.

A block that cannot be run says so to its readers: its first line is `# Not run by the tests: why`. What a command
reads is there before it runs: the tiny base in place of a published model, a run that learnt, examples. Long commands
are cut short by flags of LESS, which are added where the document does not give them. A block that is shown, and whose
first line names a YAML file, is that file; where a command has made it, it has to say the same.
"""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import processes
import pytest
import typer
import yaml
from typed import typed

import nybble
from nybble.cli.main import app
from nybble.options.verbs import load_config

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

import generate

PROJECT = Path(__file__).parents[1]
DOCUMENTS = [PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCUMENTS += sorted((PROJECT / "docs").glob("*.md"))
RUN, SHOWN = {"sh", "python"}, {"json", ""}  # what blocks hold; the others are output, or a formula
NOT_RUN = re.compile(r"# Not run by the tests: .{10,}\.$")
ALIAS = "smollm2-135m-instruct"
LESS = {
    "train": {"--max-steps": "2", "--rows-per-step": "4", "--rank": "2"},
    "eval": {"--answers": "2"},
    "eval quality": {"--eval-tokens": "64", "--calibration-tokens": "512"},
    "merge": {"--verify-positions": "300", "--calibration-tokens": "512"},
    "export": {"--verify-positions": "300"},
    "chat": {"--max-new-tokens": "4"},
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: Path
    line: int
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The YAML file that it is."""
        named = re.match(r"# ([\w-]+\.ya?ml)\n", self.text)
        return named[1] if named and self.language == "" else None

    @property
    def runs(self) -> bool:
        return self.file is not None or (self.language in RUN and NOT_RUN.match(self.text.partition("\n")[0]) is None)

    def commands(self) -> Iterator[list[str]]:
        for line in self.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    fences = re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return [Block(document, text.count("\n", 0, m.start()) + 1, m[1].strip(), m[2]) for m in fences]


def commands(program: str) -> list[list[str]]:
    """The arguments of each `program ...` line in the documents, redirections aside."""
    found = [words for document in DOCUMENTS for b in blocks(document) if b.language == "sh" for words in b.commands()]
    return [_without_redirection(words)[0][1:] for words in found if words[0] == program]


def _without_redirection(words: list[str]) -> tuple[list[str], str | None]:
    return (words[:-2], words[-1]) if ">" in words else (words, None)


def parse(command: Any, arguments: list[str]) -> None:
    """Parses `arguments` as the command line would, without running anything."""
    while getattr(command, "commands", None) and arguments and not arguments[0].startswith("-"):
        assert arguments[0] in command.commands, f"no verb {arguments[0]}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context("nybble", list(arguments))


# ---- what is written down -------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_blocks_are_of_a_kind_that_is_run_or_shown(document: Path) -> None:
    odd = [(block.line, block.language) for block in blocks(document) if block.language not in RUN | SHOWN]
    assert not odd
    assert document.read_text(encoding="utf-8").count("\n```") == 2 * len(blocks(document)), "a fence is missed"


@pytest.mark.parametrize("arguments", commands("nybble"), ids=shlex.join)
def test_nybble_commands_parse(arguments: list[str]) -> None:
    """Those that are not run too."""
    parse(typer.main.get_command(app), arguments)


def test_the_parser_here_refuses_what_nybble_would() -> None:
    with pytest.raises(typer.Exit):
        parse(typer.main.get_command(app), ["train", "--modle", "m"])
    with pytest.raises(AssertionError):
        parse(typer.main.get_command(app), ["trian"])


def test_the_documents_quote_every_verb() -> None:
    quoted = {arguments[0] for arguments in commands("nybble")}
    assert {command.name for command in app.registered_commands} <= quoted


def test_generated_pages_are_up_to_date() -> None:
    assert generate.main(["--check"]) == 0, "run: python docs/generate.py"


def test_the_options_page_has_every_flag() -> None:
    page = generate.options_page()
    flags = {flag for _, command in generate._commands() for parameter in command.params for flag in parameter.opts}
    missing = {flag for flag in flags if flag.startswith("--") and f"`{flag}`" not in page}
    assert not missing


def test_the_python_page_is_made_of_docstrings() -> None:
    def plan(model: str, rank: int = 16) -> int:
        """Say what fits.

        Args:
            model: a name,
                or a folder.

        Raises:
            ValueError: it does not.

        Example:
            >>> plan("m")
        """
        return rank

    page = generate.api_page({"plan": plan})
    for part in ("## plan", "    plan(model: str, rank: int = 16) -> int", "Say what fits.", "- `model`: a name,"):
        assert part in page
    assert "- `ValueError`: it does not." in page and '    >>> plan("m")' in page
    assert nybble.__version__ and "Nothing yet" in generate.api_page({})


def test_the_architecture_page_has_every_room_in_the_order_of_imports() -> None:
    page = (PROJECT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = page.partition("holds that: ")[2].partition(".")[0].split(", ")
    order = (PROJECT / "tests" / "test_architecture.py").read_text(encoding="utf-8").partition("ORDER = (")[2]
    rooms = {path.parent.name for path in (PROJECT / "src" / "nybble").glob("*/__init__.py")}
    assert listed == [room for room in re.findall(r'"(\w+)"', order.partition("\n)")[0]) if room in rooms]


LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_within_the_project_lead_somewhere(document: Path) -> None:
    for target, anchor in LINK.findall(document.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file = document.parent / target if target else document
        assert file.is_file(), target  # a folder is no page of the site
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("path", sorted((PROJECT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_examples_are_complete_configs(path: Path) -> None:
    load_config(path, {})


def test_the_site_is_built_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("material")
    # not --quiet, which hides warnings from --strict too
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=os.environ | QUIET)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "repository" / "CHANGELOG.html").is_file()
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img)[^>]*(?:src|href)=\"?((?:https?:)?//[^\" >]*)", page.read_text("utf-8")
        )
        assert not loaded, page


QUIET = {"NO_MKDOCS_2_WARNING": "1"}


# ---- what is typed --------------------------------------------------------------------------------


@dataclass
class Workplace:
    """A folder in which the blocks of one document run, one after the other."""

    folder: Path
    trained: Path
    servers: list[processes.Process] = field(default_factory=list)
    port: int = 0

    def run(self, block: Block) -> None:
        if block.file is not None:
            made = Path(block.file)
            if not made.exists():
                made.write_text(block.text, encoding="utf-8")
            assert yaml.safe_load(made.read_text(encoding="utf-8")) == yaml.safe_load(block.text), block
            return
        if block.language == "python":
            text = self._address(block.text).replace(ALIAS, str(self.trained.parent / "base"))
            exec(compile(text, f"{block.document.name}:{block.line}", "exec"), {})
            return
        for words in block.commands():
            words, redirected = _without_redirection(words)
            getattr(self, f"_{words[0]}")(words[1:], redirected)

    def _nybble(self, arguments: list[str], redirected: str | None) -> None:
        verb = " ".join(arguments[:2]) if arguments[:2] == ["eval", "quality"] else arguments[0]
        arguments = self._prepared(arguments, verb)
        if verb == "serve":
            return self._serve(arguments)
        result = typed(arguments, stdin="What is 1 plus 1?\n")
        allowed = (0, 2) if verb == "plan" else (0,)  # 2: the plan says that nothing fits
        assert result.exit_code in allowed, (arguments, result.output, result.exception)
        if redirected:
            Path(redirected).write_text(result.stdout, encoding="utf-8")
        if verb == "plan":
            assert "strategy" in result.stdout

    def _prepared(self, arguments: list[str], verb: str) -> list[str]:
        """The arguments with a tiny model and less to do; what they name is there."""
        for name, value in pairwise(arguments):
            if name == "--run" or (name == "--out" and "--resume" in arguments):
                shutil.rmtree(value, ignore_errors=True)
                shutil.copytree(self.trained, value)
            if name == "--model" and value.startswith("models/") and not Path(value).exists():
                shutil.copytree(self.trained.parent / "base", value)
        replaced = {ALIAS: str(self.trained.parent / "base")} if "--print-config" not in arguments else {}
        arguments = [replaced.get(argument, argument) for argument in arguments]
        if verb == "train" and "--resume" not in arguments and "--model" not in arguments:
            arguments += ["--model", str(self.trained.parent / "base")]
        less = {} if {"--resume", "--print-config", "--help"} & set(arguments) else LESS.get(verb, {})
        if "full" in arguments:
            less = {flag: value for flag, value in less.items() if flag != "--rank"}
        return arguments + [word for flag, value in less.items() if flag not in arguments for word in (flag, value)]

    def _serve(self, arguments: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        output = self.folder / f"server-{len(self.servers)}"
        self.servers.append(processes.nybble(*arguments, "--port", self.port, output=output))
        self.servers[-1].wait_for(output, "listening")
        while True:  # the line is printed just before the socket is open
            try:
                with urllib.request.urlopen(self._address("http://127.0.0.1:8000/v1/models")) as response:
                    assert response.status == 200
                return
            except urllib.error.URLError:
                assert self.servers[-1].exit_code is None

    def _address(self, text: str) -> str:
        return text.replace(":8000/", f":{self.port}/")

    def _make(self, targets: list[str], _: str | None) -> None:
        """What make would run; of the demo, its command, on other examples."""
        command = ["make", "--dry-run", "--no-print-directory", "--directory", str(PROJECT), *targets]
        planned = subprocess.run(command, capture_output=True, text=True)
        assert planned.returncode == 0, planned.stderr
        if targets == ["demo"]:
            words = shlex.split(planned.stdout.strip().splitlines()[-1])[1:]
            assert words == ["train", "examples/demo.yaml"]
            self._nybble(["train", str(PROJECT / words[1]), "--data", "examples.jsonl", "--out", "runs/demo"], None)

    def _pip(self, arguments: list[str], _: str | None) -> None:
        pinned = (PROJECT / "constraints.txt").read_text().replace("_", "-").lower()
        assert arguments[:3] == ["install", "--constraint", "constraints.txt"]
        assert all(f"\n{package}==" in pinned for package in arguments[3:])

    def _source(self, arguments: list[str], _: str | None) -> None:
        assert arguments == [".venv/bin/activate"]

    def close(self) -> None:
        for server in self.servers:
            os.kill(server.pid, signal.SIGTERM)
            server.end()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if any(block.runs for block in blocks(path))], ids=lambda path: path.name
)
def test_what_a_document_says_to_type_runs(
    document: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained.parent / "rows.jsonl", "examples.jsonl")
    workplace = Workplace(tmp_path, trained)
    try:
        for block in blocks(document):
            if block.runs:
                workplace.run(block)
    finally:
        workplace.close()


PLANS = [arguments for arguments in commands("nybble") if arguments[0] == "plan" and ALIAS not in arguments]


@pytest.mark.parametrize("arguments", PLANS, ids=shlex.join)
def test_plans_come_out_as_the_documents_say(arguments: list[str]) -> None:
    result = typed(arguments)
    assert result.exit_code in (0, 2), result.output
    for quoted in re.findall(r"[0-9.]+ (?:[GM]B|s\b)", quoted_output(arguments)):
        assert quoted in " ".join(result.stdout.split()) + result.stderr


def quoted_output(arguments: list[str]) -> str:
    """What a document says that a plan for a machine of the table prints; nothing for this machine."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for command, output in re.findall(
            r"^nybble ([^\n]*)\n```\n+gives(?:, among other lines,)?\n+```\n(.*?)^```", text, re.MULTILINE | re.DOTALL
        ):
            if shlex.split(command) == arguments:
                return str(output)
    assert "--machine" not in arguments, "its figures are the same everywhere, so they can be quoted"
    return ""
