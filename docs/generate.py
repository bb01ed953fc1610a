"""Writes options.md and api.md anew: from the options' classes, and from the docstrings of what `nybble` exports.

`--check` writes nothing and fails where a page is not what it would write. A test does that.
"""

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import nybble
from nybble.cli.main import app
from nybble.options import verbs
from nybble.options.option import Verb, allowed_values, fields_by_group, fields_of, yaml_key

DOCS = Path(__file__).parent
OPTIONS: dict[str, type[Verb]] = {
    "train": verbs.TrainConfig,
    "chat": verbs.ChatConfig,
    "plan": verbs.PlanConfig,
    "quantize": verbs.QuantizeConfig,
    "synth": verbs.SynthConfig,
    "serve": verbs.ServeConfig,
    "merge": verbs.MergeConfig,
    "export": verbs.ExportConfig,
    "push": verbs.PushConfig,
    "data check": verbs.DataConfig,
    "eval": verbs.EvalConfig,
    "eval quality": verbs.EvalQualityConfig,
}
OPTIONS_HEAD = """# Options

Each option is a flag (`--rank 16`) and, for `nybble train`, a key of a YAML file (`rank: 16`). Switches have a
`--no-` form. "Elsewhere" is what other tools call it: nybble knows those names, and answers with its own.

`nybble VERB --help` prints a verb's options. [The tutorial](tutorial.md#options) shows how to train from a file.

## Verbs
"""
API_HEAD = """# From Python

What the package `nybble` exports.
"""
API_EMPTY = """
Nothing yet but `nybble.__version__`. Use the [command line](options.md).
"""
SECTION = re.compile(r"(Args|Returns|Raises|Yields|Example|Examples):")


# ---- options -------------------------------------------------------------------------------------


def options_page() -> str:
    lines = [OPTIONS_HEAD, "| verb | what it does |", "|---|---|"]
    lines += [f"| `nybble {verb}` | {_cell(command.help)} |" for verb, command in _commands()]
    for group, rows in _groups().items():
        lines += ["", f"## {group}", "", "| option | meaning | takes | default | verbs | elsewhere |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [f"| {' | '.join((*row, ', '.join(names), elsewhere))} |" for (*row, elsewhere), names in rows.items()]
    lines += ["", "## Of one verb alone", "", "| verb | option | meaning |", "|---|---|---|"]
    for verb, command in _commands():
        for parameter in _own(verb, command):
            name = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.metavar
            lines.append(f"| {verb} | `{name}` | {_cell(parameter.help)} |")
    return "\n".join(lines) + "\n"


def _groups() -> dict[str, dict[tuple[str, ...], list[str]]]:
    """Group -> an option as it stands in a table, but for the verbs that take it just so -> those verbs."""
    groups: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for verb, options in OPTIONS.items():
        for group, fields in fields_by_group(options).items():
            for name, field in fields.items():
                elsewhere = ", ".join(f"`{alias}`" for alias in field.json_schema_extra["aliases"])  # type: ignore
                row = f"`--{yaml_key(name)}`", _cell(field.description), _cell(allowed_values(field)), _default(field)
                groups.setdefault(group, {}).setdefault((*row, elsewhere), []).append(verb)
    return groups


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    if field.default is None or field.default == ():
        return ""
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    value = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{value}`"


def _commands() -> Iterator[tuple[str, Any]]:
    """Each verb's name and its click command; of a group of verbs, the group where it does something itself."""

    def walk(command: Any, name: str) -> Iterator[tuple[str, Any]]:
        if name and (not hasattr(command, "commands") or command.invoke_without_command):
            yield name, command
        for verb, subcommand in getattr(command, "commands", {}).items():
            yield from walk(subcommand, f"{name} {verb}".strip())

    return walk(typer.main.get_command(app), "")


def _own(verb: str, command: Any) -> Iterator[Any]:
    """Parameters of a verb that are none of its options."""
    fields = fields_of(OPTIONS.get(verb, Verb))
    return (parameter for parameter in command.params if parameter.name not in fields)


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


# ---- the package ---------------------------------------------------------------------------------


def api_page(exported: dict[str, Any]) -> str:
    """A page of names and what they are, in their order."""
    return API_HEAD + ("".join(_entry(name, thing) for name, thing in exported.items()) or API_EMPTY)


def exported() -> dict[str, Any]:
    names = (name for name in getattr(nybble, "__all__", ()) if name != "__version__")
    return {name: getattr(nybble, name) for name in names}


def _entry(name: str, thing: Any) -> str:
    if not inspect.isfunction(thing) and not inspect.isclass(thing):  # another name for a type has no text of its own
        return f"\n## {name}\n\n    {name} = {_short(thing)}\n"
    return f"\n## {name}\n\n    {name}{_short(inspect.signature(thing))}\n\n{_prose(inspect.getdoc(thing))}\n"


def _short(signature: Any) -> str:
    """As text, without the modules of names and the addresses of functions."""
    text = re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", str(signature))
    return re.sub(r"\b(?:[a-zA-Z_]\w*\.)+(\w+)", r"\1", text)


def _prose(docstring: str | None) -> str:
    """A docstring as Markdown: its sections become bold words, their entries a list; code stays code."""
    lines, listed, fenced = [], False, False
    for line in (docstring or "").splitlines():
        fenced ^= line.lstrip().startswith("```")
        section = SECTION.fullmatch(line)
        if section:
            listed = not section[1].startswith("Example")
            lines += [f"**{section[1]}**", ""]
        elif listed and not fenced and re.match(r"    \S", line):
            name, colon, meaning = line.strip().partition(":")
            lines.append(f"- `{name}`:{meaning}" if colon else f"- {name}")
        else:
            listed = listed and (not line or line.startswith(" "))
            lines.append(line.strip() if listed and not fenced else line)
    return "\n".join(lines)


PAGES = {"options.md": options_page, "api.md": lambda: api_page(exported())}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page would change")
    check = parser.parse_args(arguments).check
    stale = [name for name, page in PAGES.items() if not (DOCS / name).exists() or (DOCS / name).read_text() != page()]
    for name in stale:
        if check:
            print(f"docs/{name} is not up to date; run: python docs/generate.py", file=sys.stderr)
        else:
            (DOCS / name).write_text(PAGES[name](), encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
