"""builtin general text: what the modules of Python's standard library say about themselves, in prose.

For asking what a model has forgotten, wherever nybble runs: nothing is downloaded and nothing is imported. It depends
on the Python version alone, and no fine-tuning data are likely to hold it.
"""

import ast
import sysconfig
import warnings
from pathlib import Path

MIN_CHARACTERS = 400


def read_general_text(max_characters: int, root: Path | None = None) -> list[str]:
    """Module docstrings of at least MIN_CHARACTERS in the order of their paths, up to `max_characters` in all.

    Args:
        root: a folder of Python sources; the running Python's standard library by default.
    """
    folder = root or Path(sysconfig.get_paths()["stdlib"])
    texts, characters = [], 0
    for path in sorted(folder.glob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in the sources are not the user's business
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if len(docstring) >= MIN_CHARACTERS:
            texts.append(docstring[: max_characters - characters])
            characters += len(texts[-1])
        if characters >= max_characters:
            break
    return texts
