"""The examples in the docstrings of what `nybble` exports, run one after another as a reader would."""

import doctest
import io
from pathlib import Path
from typing import Any

import pytest

import nybble

SHOWN = ["open_model", "load_data", "TrainingData.batches", "TrainingData.steps", "load", "add_adapters", "Model.loss"]
SHOWN += ["Model.save_adapter", "plan", "quantize", "train", "open_run", "Run.generate", "evaluate", "merge", "export"]
SHOWN += ["serve", "check_data", "synth", "evaluate_quality", "compare", "quantize_", "NybbleConfig"]
SHOWN += ["accelerate", "import_config", "push"]


def named(path: str) -> Any:
    found: Any = nybble
    for part in path.split("."):
        found = getattr(found, part)
    return found


def test_every_function_has_an_example_and_says_what_it_raises() -> None:
    functions = [name for name in nybble.__all__ if name[0].islower()]
    assert set(functions) <= set(SHOWN)
    for name in functions:
        assert "Raises:" in named(name).__doc__ and ">>> " in named(name).__doc__, name


def test_the_examples_run(
    tiny_model: Path, trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"nybble": nybble, "tiny": tiny_model}
    for name in SHOWN:
        if name == "Run.generate":
            names["run"] = trained  # one that has learnt something
        example = doctest.DocTestParser().get_doctest(named(name).__doc__, names, name, None, None)
        said = io.StringIO()
        failed = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.write, clear_globs=False)
        names |= example.globs
        assert example.examples and not failed.failed, said.getvalue()
    assert not capsys.readouterr().out, "nothing is printed unless asked"
