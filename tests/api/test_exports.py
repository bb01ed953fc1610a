"""What `nybble` exports: nothing heavy until it is used, and no name that stands for two things."""

import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import nybble
from nybble.api.keywords import as_options

NAMES = [name for name in nybble.__all__ if name != "__version__"]
HEAVY = "{'torch', 'transformers', 'numpy', 'pydantic', 'rich'} & sys.modules.keys()"


def python(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_brings_nothing_heavy_and_options_are_checked_before_it() -> None:
    assert python(f"import sys, nybble; dir(nybble); print({HEAVY})") == "set()"
    mistake = "import sys, nybble\ntry: nybble.train(rnak=8)\nexcept nybble.NybbleError as error: print(error.got)"
    assert python(f"{mistake}\nprint('torch' in sys.modules)").splitlines() == [
        "There is no option 'rnak'. Did you mean 'rank'?",
        "False",
    ]


@pytest.mark.benchmark
def test_importing_takes_less_than_a_tenth_of_a_second() -> None:
    def seconds() -> float:
        return float(python("import time; t = time.perf_counter(); import nybble; print(time.perf_counter() - t)"))

    assert min(seconds() for _ in range(5)) < 0.1


def test_every_name_is_there_and_is_listed_once() -> None:
    assert sorted(nybble._MODULES) == NAMES and set(NAMES) <= set(dir(nybble))
    for name in NAMES:
        assert getattr(nybble, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        nybble.trian  # noqa: B018


def test_no_function_has_the_name_of_a_package() -> None:
    """Importing the package would put it in the function's place."""
    assert not set(NAMES) & {module.name for module in pkgutil.iter_modules(nybble.__path__)}


PLACES = ["planning", "quantization", "exporting", "evaluation", "training", "runs.open_run", "api.plan"]


def test_names_stay_what_they_are_whatever_is_imported_first() -> None:
    """An imported package becomes an attribute of `nybble`. No name is one: each is looked up whenever it is asked for,
    so that the order does not matter.
    """
    for place in PLACES:
        import_module(f"nybble.{place}")
    assert not [name for name in nybble.__all__ if isinstance(getattr(nybble, name), ModuleType)]
    assert not set(NAMES) & vars(nybble).keys()


def test_keywords_take_paths_wherever_they_stand(tmp_path: Path) -> None:
    given = {"model": tmp_path, "data": [tmp_path, "b.jsonl"], "rank": 4, "memory": "8GB"}
    assert as_options(given) == {"model": str(tmp_path), "data": [str(tmp_path), "b.jsonl"], "rank": 4, "memory": "8GB"}
