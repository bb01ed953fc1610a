"""builtin:pydoc: real rows of the running Python, checked against `ast` and against hand-written sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from nybble.data.readers import read_examples
from nybble.data.standard_library import INSTRUCTION, first_sentence, read_pydoc


@pytest.fixture(scope="module")
def rows():
    return list(read_examples("builtin:pydoc").examples)


def code_of(example) -> str:
    return example.prompt.removeprefix(f"{INSTRUCTION}\n\n```python\n").removesuffix("\n```")


def test_thousands_of_rows_all_different(rows):
    assert len(rows) >= 2_000
    assert len({(row.prompt, row.completion) for row in rows}) == len(rows)
    assert all(15 <= len(row.completion) <= 200 and "\n" not in row.completion for row in rows)
    assert all(60 <= len(code_of(row)) <= 1200 for row in rows)


def test_code_parses_and_has_lost_its_docstring(rows):
    for row in rows:
        [function] = ast.parse(code_of(row)).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef), row.origin
        assert ast.get_docstring(function) is None or row.completion not in ast.get_docstring(function), row.origin


def test_origin_names_the_file_and_line(rows):
    import sysconfig

    root = Path(sysconfig.get_paths()["stdlib"])
    for row in rows[:: len(rows) // 50]:
        name, line = row.origin.rsplit(":", 1)
        source = (root / name).read_text(encoding="utf-8").splitlines()
        assert source[int(line) - 1].strip() == code_of(row).splitlines()[0].strip()


def test_nothing_is_imported(tmp_path):
    (tmp_path / "loud.py").write_text(
        "raise SystemExit('imported')\n"
        "def add(first, second):\n    '''Return the sum of two numbers.\n\n    More.\n    '''\n"
        "    total = first + second\n    return total\n"
    )
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text((tmp_path / "loud.py").read_text())
    [row] = read_pydoc(tmp_path)
    assert (row.origin, row.completion) == ("loud.py:2", "Return the sum of two numbers.")
    assert code_of(row) == "def add(first, second):\n    total = first + second\n    return total"


def test_same_rows_in_another_process(tmp_path):
    (tmp_path / "b.py").write_text("def f(x):\n    'Return x, but only after a while.'\n" + "    x += 1\n" * 8)
    (tmp_path / "a.py").write_text("def g(x):\n    'Return x, but only before long.'\n" + "    x += 2\n" * 8)
    code = (
        "from pathlib import Path; from nybble.data.standard_library import read_pydoc; "
        f"print(read_pydoc(Path({str(tmp_path)!r})))"
    )
    root = str(Path(__file__).parents[2] / "src")
    other = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": root}, capture_output=True, text=True)
    assert other.stdout.strip() == str(read_pydoc(tmp_path)), other.stderr
    assert [row.origin for row in read_pydoc(tmp_path)] == ["a.py:1", "b.py:1"]


@pytest.mark.parametrize(
    "docstring, sentence",
    [
        ("Return the name. It is short.", "Return the name."),
        ("Return a thing, e.g. a name. More.", "Return a thing, e.g. a name."),
        ("Return the version 3.11 of it.", "Return the version 3.11 of it."),
        ("Return the name\nof the thing. More.", "Return the name of the thing."),
        ("Return the name without period\n\nMore.", "Return the name without period"),
        ("Return the name without\nany period at all\n\nMore.", None),
        ("Short.", None),
        ("S.f(a, b) -> something useful to have.", None),
        ("lower case beginnings are no prose.", None),
        ("", None),
    ],
)
def test_first_sentence(docstring, sentence):
    assert first_sentence(docstring) == sentence
