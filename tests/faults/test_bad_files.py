"""Every bad file of the corpus ends in one message and exit code 2; `make drills` measures time and memory too."""

import sys
from pathlib import Path

import pytest
from typed import typed

sys.path.insert(0, str(Path(__file__).parent))

from bad_file import BadFile
from corpus import all_cases

CASES = all_cases()


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len(CASES) >= 200


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_file_is_one_message(case: BadFile, tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("nybble.data.template.RENDER_SECONDS", 0.3)
    result = typed(case.build(tmp_path, tiny_model))
    assert isinstance(result.exception, SystemExit), f"an exception escaped: {result.exception!r}"
    assert result.exit_code == 2, result.output[-500:]
    assert result.stderr.startswith("Error: ") and "Traceback" not in result.output
    assert "\x1b" not in result.stderr
    for words in case.says:
        assert words in result.stderr, result.stderr[:500]
    assert not (tmp_path / "out").exists()
