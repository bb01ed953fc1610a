"""Rows that `datasets` reads: Parquet files, hub data sets, and what its `save_to_disk` wrote."""

import re
import sys
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from nybble.data.file_kinds import ALLOWED_FILES, Row, Rows
from nybble.data.sources import SAVED_SPLITS, DataSource
from nybble.errors import DataError
from nybble.network import may_fetch

COUNTED = re.compile(r"%|-\d")  # in a slice: what only the number of rows makes a place


def parquet_rows(path: Path, name: str) -> Rows:
    """The rows of a Parquet file, a group of rows at a time."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs below that, it raises too
    try:
        rows = _undecoded(datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True))
        named = class_names(rows.features)
        yield from ((f"{name}:{number}", with_names(row, named)) for number, row in enumerate(rows, 1))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: not readable as Parquet: {error}") from error


def _undecoded(rows: Any) -> Any:
    """The rows with pictures as their files are: they are decoded where they are needed."""
    for column, kind in (rows.features or {}).items():
        if (own := _as_files(kind)) != kind:
            rows = rows.cast_column(column, own)
    return rows


def _as_files(kind: Any) -> Any:
    """A column's type with its pictures, at any depth, as files."""
    from datasets import Image, List

    if isinstance(kind, Image):
        return Image(decode=False)
    if isinstance(kind, dict):
        return {name: _as_files(each) for name, each in kind.items()}
    return List(_as_files(kind.feature), kind.length) if isinstance(kind, List) else kind


def class_names(features: Any) -> dict[str, list[str]]:
    """Column -> the names of its numbers, where a data set has them (its features of the type ClassLabel, or lists of
    such).
    """
    from datasets import ClassLabel

    kinds = {column: getattr(kind, "feature", kind) for column, kind in (features or {}).items()}
    return {column: kind.names for column, kind in kinds.items() if isinstance(kind, ClassLabel)}


def with_names(row: Row, named: Mapping[str, list[str]]) -> Row:
    """The row without nulls, numbers of classes replaced by their names; those without one, such as -1, stay."""
    row = without_nulls(row)
    for column, names in named.items():
        if column not in row:
            continue
        value = row[column]
        row[column] = [_named(each, names) for each in value] if isinstance(value, list) else _named(value, names)
    return row


def _named(value: Any, names: list[str]) -> Any:
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def without_nulls(row: Row) -> Row:
    """The row without the keys that Arrow fills with null: a column's objects have all the keys of all of them."""
    return {column: _without_null_keys(value) for column, value in row.items()}


def _without_null_keys(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_null_keys(part) for part in value]
    if isinstance(value, dict):
        return {key: _without_null_keys(part) for key, part in value.items() if part is not None}
    return value


def hub_rows(source: DataSource) -> Rows:
    """The split "train" of a hub data set, or the one that is named, streamed."""
    import datasets

    if not may_fetch():
        raise DataError(
            f"{source.given}: no file here, and with --offline the hub is not asked", f"allowed: {ALLOWED_FILES}"
        )
    name, _, config = source.name.partition(":")
    try:
        held = datasets.load_dataset(name, config or None, streaming=True)
        lengths = {split: (rows.info.splits or {}).get(split) for split, rows in held.items()}
        counts = {split: info.num_examples if info is not None else None for split, info in lengths.items()}
        yield from split_rows(source, held, counts)
    except DataError:
        raise
    except ConnectionError as error:
        raise DataError(
            f"{source.given}: the hub cannot be reached ({error})",
            f"a hub id needs a network; without one: {ALLOWED_FILES}",
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source.given}: the hub's data set cannot be read: {error}") from error


def saved_rows(source: DataSource) -> Rows:
    """A data set that `save_to_disk` wrote, mapped into memory; of several splits the one that is named."""
    import datasets

    folder = Path(source.name).expanduser()
    try:
        saved = datasets.load_from_disk(str(folder))
        held = dict(saved) if (folder / SAVED_SPLITS).is_file() else {str(saved.split or "train"): saved}
        if source.split is None and len(held) == 1:
            source = source._replace(split=next(iter(held)))
        yield from split_rows(source, held, {split: len(rows) for split, rows in held.items()})
    except DataError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source.given}: not readable as a saved data set: {error}") from error


def split_rows(source: DataSource, held: Mapping[str, Any], counts: Mapping[str, int | None]) -> Rows:
    """The rows of a split, or of what else `datasets` takes for one: "train[:1000]", "train[10%:20%]", "train+test".

    Args:
        held: the data set's splits.
        counts: their numbers of rows, None where that is not known.

    Raises:
        DataError: there is no such split, or a slice needs a number that is not known.
    """
    from datasets import ReadInstruction

    wanted = "train" if source.split is None else source.split
    fix = f"name one of them: {source.name}#{next(iter(held))}"
    try:
        instruction = ReadInstruction.from_spec(wanted)
        named = [part.partition("[")[0].strip() for part in instruction.to_spec().split("+")]
        if unknown := next((name for name in named if name not in held), None):
            raise DataError(f"{source.given}: no split {unknown!r}", f"its splits: {', '.join(held)}", fix)
        if COUNTED.search(wanted) and any(counts[name] is None for name in named):
            raise DataError(
                f"{source.given}: a slice from the end, or in per cent, of a split whose number of rows is not said",
                "allowed here: slices counted from its beginning, such as train[:1000]",
            )
        places = instruction.to_absolute(
            {name: sys.maxsize if count is None else count for name, count in counts.items()}
        )
    except DataError:
        raise
    except (ValueError, AssertionError) as error:  # what `datasets` says to what it cannot take
        raise DataError(f"{source.given}: {error}", "allowed: a split, or a slice of it: train[:1000]", fix) from error
    for place in places:
        origin = source.given if source.split is None else f"{source.name}#{place.splitname}"
        classes = class_names(held[place.splitname].features)
        rows = _undecoded(held[place.splitname]).skip(place.from_)
        for number, row in enumerate(islice(rows, place.to - place.from_), place.from_ + 1):
            yield f"{origin}:{number}", with_names(row, classes)
