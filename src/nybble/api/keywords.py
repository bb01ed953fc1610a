"""Keywords of the API's functions as the options of a verb."""

import os
from collections.abc import Mapping
from typing import Any

RunLike = str | os.PathLike[str]  # a run folder's path, or the run itself


def as_options(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """`keywords` with paths as text: an option that takes a path or a name takes either."""
    return {name: _text(value) for name, value in keywords.items()}


def _text(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_text(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
