"""What Python's standard library says about itself, to train on and to ask about.

Read from the source files of the Python that runs this, with `ast`; nothing is imported, nothing downloaded. It depends
on the Python version alone.

`read_pydoc` is builtin:pydoc: functions and the first sentence of their docstrings. Left out: tests, generated tables,
and modules that are applications more than libraries; docstrings that are not prose; functions too short or too long to
describe. `read_general_text` is prose for asking what a model has forgotten: no fine-tuning data are likely to hold it.
"""

import ast
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from nybble.data.examples import Example

Function = ast.FunctionDef | ast.AsyncFunctionDef
INSTRUCTION = "Write the first sentence of this function's docstring."
SKIPPED_FOLDERS = {
    *("test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data", "ensurepip"),
    *("site-packages", "dist-packages", "__pycache__"),
}
MIN_CHARACTERS = 400  # of a module's docstring
SENTENCE_LENGTH = range(15, 201)  # characters
SOURCE_LENGTH = range(60, 1201)
SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.](?=\s|$)")
PROSE = re.compile(r"[A-Z][A-Za-z']*,? .*[a-z].*")


def read_pydoc(root: Path | None = None) -> list[Example]:
    """Rows in the order of file path and line, exact duplicates left out.

    Args:
        root: a folder of Python sources; the running Python's standard library by default.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    unique: dict[tuple[str, str], Example] = {}
    for path in _sources(root):
        for line, source, sentence in _described_functions(path):
            prompt = f"{INSTRUCTION}\n\n```python\n{source}\n```"
            example = Example(f"{path.relative_to(root).as_posix()}:{line}", prompt=prompt, completion=sentence)
            unique.setdefault((source, sentence), example)
    return list(unique.values())


def _sources(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.suffix == ".py" and path.is_file():
            yield path
        elif path.is_dir() and path.name not in SKIPPED_FOLDERS:
            yield from _sources(path)


def _described_functions(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, source without docstring, first sentence) of every function worth describing."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in _functions(_parse(text).body):
        sentence = first_sentence(ast.get_docstring(node) or "")
        source = _without_docstring(node, lines) if sentence else None
        if sentence and source and len(source) in SOURCE_LENGTH:
            yield node.lineno, source, sentence


def _functions(statements: Iterable[ast.AST]) -> Iterator[Function]:
    """Functions in the order of their lines. Only statements hold statements, so expressions are not walked."""
    for statement in statements:
        if isinstance(statement, Function):
            yield statement
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            yield from _functions(getattr(statement, block, ()))


def first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring's first paragraph, on one line; None where that is not prose."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    end = SENTENCE_END.search(paragraph)
    one_line = "\n" not in docstring.strip().split("\n\n")[0]
    sentence = paragraph[: end.end()] if end else paragraph
    if not (end or one_line) or len(sentence) not in SENTENCE_LENGTH or not PROSE.fullmatch(sentence):
        return None
    return None if "->" in sentence or ">>>" in sentence else sentence


def _without_docstring(node: Function, lines: list[str]) -> str | None:
    """The function's lines without its docstring's; None where the docstring is all it does, or shares a line."""
    if len(node.body) < 2:
        return None
    docstring, following = node.body[0], node.body[1]
    assert node.end_lineno is not None and docstring.end_lineno is not None
    opening = lines[docstring.lineno - 1].strip()[:1]
    if following.lineno == docstring.end_lineno or opening not in ("'", '"', "r", "R"):
        return None
    kept = lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    return textwrap.dedent("\n".join(line.rstrip() for line in kept)).strip()


def read_general_text(max_characters: int, root: Path | None = None) -> list[str]:
    """Module docstrings of at least MIN_CHARACTERS in the order of their paths, up to `max_characters` in all.

    Args:
        root: a folder of Python sources; the running Python's standard library by default.
    """
    folder = root or Path(sysconfig.get_paths()["stdlib"])
    texts, characters = [], 0
    for path in sorted(folder.glob("*.py")):
        docstring = ast.get_docstring(_parse(path.read_text(encoding="utf-8"))) or ""
        if len(docstring) >= MIN_CHARACTERS:
            texts.append(docstring[: max_characters - characters])
            characters += len(texts[-1])
        if characters >= max_characters:
            break
    return texts


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the sources are not the user's business
        return ast.parse(source)
