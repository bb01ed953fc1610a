"""Texts of Python's own standard library: docstrings, what each is from (to tell apart) and what it is of (to embed).

    python benchmarks/make_texts.py texts/

writes `train.jsonl` and `held_out.jsonl`: {"text", "label"}, the label a package or module; and `pairs_train.jsonl` and
`pairs_held_out.jsonl`: {"query", "document"}, the query the words of module and object that the docstring is of. A
docstring's own module and its object's name are masked in it where they are spelled. Held out is a fifth of the
docstrings, drawn by a hash of the text, so that no text stands on both sides.
"""

import argparse
import ast
import hashlib
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from nybble.data.standard_library import SKIPPED_FOLDERS

MOST, LEAST = 400, 120  # docstrings of a class
CHARACTERS = range(40, 1500)
HELD_OUT = 5  # one of so many


def docstrings(root: Path) -> Iterator[tuple[str, str, str]]:
    """(class, words of its name, docstring) of functions and classes; the class is the package, or the module where
    that is in none.
    """
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS & set(parts):
            continue
        package = parts[0].removesuffix(".py").lstrip("_").removeprefix("py")
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                named = {node.name, package, path.stem}
                text = re.sub("|".join(rf"\b{re.escape(name)}\b" for name in named), "it", text, flags=re.IGNORECASE)
                if len(text) in CHARACTERS:
                    words = re.sub(r"_+|(?<=[a-z])(?=[A-Z])", " ", f"{package} {path.stem} {node.name}")
                    yield package, " ".join(words.lower().split()), text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    found: dict[str, tuple[str, str]] = {}
    for label, name, text in docstrings(Path(sysconfig.get_paths()["stdlib"])):
        found.setdefault(text, (label, name))
    counts = Counter(label for label, _ in found.values())
    kept = {label for label, count in counts.items() if count >= LEAST}
    taken: Counter[str] = Counter()
    parts: dict[str, list[str]] = {"train": [], "held_out": []}
    pairs: dict[str, list[str]] = {"train": [], "held_out": []}
    for text, (label, name) in sorted(found.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest()):
        part = "held_out" if hashlib.sha256(text.encode()).digest()[-1] % HELD_OUT == 0 else "train"
        pairs[part].append(json.dumps({"query": name, "document": text}))
        if label in kept and taken[label] < MOST:
            taken[label] += 1
            parts[part].append(json.dumps({"text": text, "label": label}))
    out.mkdir(parents=True, exist_ok=True)
    for part, lines in (parts | {f"pairs_{part}": lines for part, lines in pairs.items()}).items():
        (out / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print({part: (len(lines), len(pairs[part])) for part, lines in parts.items()}, dict(taken))


if __name__ == "__main__":
    main()
