"""Folders of pictures, a folder a class, as rows."""

from collections.abc import Iterable
from pathlib import Path

from nybble.data.file_kinds import Rows
from nybble.data.text_encoder import RowError


def folder_rows(root: Path, pictures: Iterable[Path]) -> Rows:
    """A row for each of the pictures in a folder of folders, whose names are the classes."""
    for path in pictures:
        inside = path.relative_to(root)
        origin = f"{root.name}/{inside}"
        if len(inside.parts) == 1:
            yield RowError("missing-label", origin, "it lies in no folder of a class")
        else:
            yield origin, {"image": str(path), "label": inside.parts[0]}
