"""What a shell completes behind a flag: values of a fixed set, and names that nybble knows.

Where nothing of these fits, nothing is answered, and the shells complete paths by themselves. Each press of the key is
a process, so nothing heavy is imported.
"""

import os
from collections.abc import Callable, Sequence
from typing import get_args, get_origin

from pydantic.fields import FieldInfo

from nybble.cards import CARDS
from nybble.options.option import alternatives, choices_of

Completer = Callable[[str], list[str]]


def _aliases() -> Sequence[str]:
    from nybble.sources.bundled import BUNDLED

    return list(BUNDLED)


PATHS_TOO: dict[str, Callable[[], Sequence[str]]] = {  # option -> names that it takes beside paths
    **dict.fromkeys(("model", "teacher"), _aliases),
    **dict.fromkeys(("data", "validation_data"), lambda: ["builtin:pydoc"]),
}


def completer(name: str, field: FieldInfo) -> Completer | None:
    """Begun value of an option -> values that it may become; None where there are none to tell."""
    if name in PATHS_TOO:
        return _names_and_paths(PATHS_TOO[name])
    kinds = [get_args(kind)[0] if get_origin(kind) is tuple else kind for kind in alternatives(field)]
    words = list(CARDS) if name == "machine" else [str(choice) for kind in kinds for choice in choices_of(kind)]
    several = any(get_origin(kind) is tuple for kind in alternatives(field))

    def complete(begun: str) -> list[str]:
        before, comma, last = begun.rpartition(",") if several else ("", "", begun)
        left = [word for word in words if word not in before.split(",")]
        return [f"{before}{comma}{word}" for word in left if word.startswith(last)]

    return complete if words else None


def _names_and_paths(names: Callable[[], Sequence[str]]) -> Completer:
    """The names that fit, and beside them what of the current folder does, which the shell then no longer adds."""

    def complete(begun: str) -> list[str]:
        found = [name for name in names() if name.startswith(begun)]
        here = sorted(os.scandir(), key=lambda entry: entry.name) if found else []
        visible = (entry for entry in here if not entry.name.startswith(".") and entry.name.startswith(begun))
        return found + [f"{entry.name}/" if entry.is_dir() else entry.name for entry in visible]

    return complete
