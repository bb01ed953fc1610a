"""What --data names: files, folders, patterns, hub ids, each with a split and a weight where it has them."""

import glob
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from nybble.data.file_kinds import ALLOWED_FILES, SUFFIXES, TEXT_SUFFIXES, IsRow, kind_of
from nybble.data.picture_files import PICTURE_SUFFIXES
from nybble.errors import DataError

BUILTIN = "builtin:"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
WEIGHT = re.compile(r"-?(\d{1,9}(\.\d{0,9})?|\.\d{1,9})")
HELD_OUT_NAME = re.compile(r"(?:^|[^a-z])(?:test|valid|validation|val|dev|eval|heldout|held-out)(?:[^a-z]|$)")
# As `datasets` finds them: shards name their split, other files and their folders by one of these words.
SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
METADATA = "metadata"  # what files are called whose rows name the pictures beside them
SAVED_SPLITS, SAVED_ROWS = "dataset_dict.json", "state.json"  # what `save_to_disk` leaves in a folder


class DataSource(NamedTuple):
    """One thing that --data names.

    Args:
        given: as the user wrote it, the weight aside.
        name: of it a file, a folder, a pattern, a hub id "owner/name[:config]", or one of nybble's own.
        split: what is behind its '#'; None where nothing is.
        weight: how often its rows are drawn beside those of the others; None where each row is drawn once.
    """

    given: str
    name: str
    split: str | None
    weight: Fraction | None

    @property
    def on_hub(self) -> bool:
        """Whether it is the id of a hub data set: of its form, and no file's name."""
        path = Path(self.name).expanduser()
        return not path.exists() and kind_of(path) not in SUFFIXES and HUB_ID.fullmatch(self.name) is not None

    @property
    def saved(self) -> bool:
        """Whether it is a folder that `save_to_disk` wrote."""
        folder = Path(self.name).expanduser()
        return (folder / SAVED_SPLITS).is_file() or (folder / SAVED_ROWS).is_file()


class Found(NamedTuple):
    """The files that one source stands for; or the pictures in its one folder, whose folders are classes."""

    paths: list[Path]
    notices: list[str]
    pictures: tuple[Path, ...] = ()


def parse_sources(given: Sequence[str]) -> list[DataSource]:
    """What each "NAME[#SPLIT][:WEIGHT]" says. A name that exists as it stands is that file.

    Raises:
        DataError: a weight is none, or only some sources have one.
    """
    sources = [_parse(text) for text in given]
    unweighted = [source.given for source in sources if source.weight is None]
    if unweighted and len(unweighted) < len(sources):
        raise DataError(
            f"{unweighted[0]}: no weight, and others have one",
            "needed: a weight with each --data, or with none",
            f"give it one, as in --data {unweighted[0]}:0.5",
        )
    if len(sources) == 1 and not unweighted:
        [only] = sources
        raise DataError(
            f"{only.given}: a weight, and nothing beside it",
            "a weight says how often rows are drawn beside those of another --data",
            f"leave ':{given[0].rpartition(':')[2]}' out; a hub configuration of that name: {only.given}:NAME#train",
        )
    return sources


def refuse_weights(given: Sequence[str], why: str) -> None:
    """Refuse weights where nothing is drawn by them.

    Raises:
        DataError: one of the sources has a weight.
    """
    if (weighted := next((source for source in parse_sources(given) if source.weight is not None), None)) is not None:
        raise DataError(f"{weighted.given}: a weight", f"weights say what training draws; {why}", "leave it out")


def _parse(text: str) -> DataSource:
    given, weight = _split_weight(text)
    name, mark, split = given.rpartition("#")
    if not mark or not name or _exists(given) or kind_of(Path(split)) in SUFFIXES or given.startswith(BUILTIN):
        return DataSource(given, given, None, weight)
    return DataSource(given, name, split, weight)


def _split_weight(text: str) -> tuple[str, Fraction | None]:
    given, colon, said = text.rpartition(":")
    if not colon or not given or "]" in said or _exists(text):  # a slice of a split has a colon too
        return text, None
    if WEIGHT.fullmatch(said):
        if (weight := Fraction(said)) <= 0:
            raise DataError(f"{given}: its weight is {said}", "needed: a weight above 0", "leave out what is not drawn")
        return given, weight
    if _exists(given) or _exists(given.rpartition("#")[0]):
        raise DataError(f"{given}: its weight is {said!r}", "needed: a number above 0, such as 0.7")
    return text, None


def _exists(name: str) -> bool:
    """Whether these are files, or one of nybble's own sources."""
    if not name or name.startswith(BUILTIN):
        return name.startswith(BUILTIN) and ":" not in name.removeprefix(BUILTIN)
    return Path(name).expanduser().exists() or (glob.has_magic(name) and bool(glob.glob(name, recursive=True)))


def find_files(source: DataSource, is_row: IsRow) -> Found:
    """The files that a source stands for, where it is no hub id and no saved data set.

    Args:
        is_row: whether an object is a row of the kind that is read.

    Raises:
        DataError: there are none, they are of a kind that holds no rows, or its split is not there.
    """
    name, path = source.name, Path(source.name).expanduser()
    if path.is_dir():
        return _find_in_folder(source, path, is_row)
    if source.split is not None:
        raise DataError(
            f"{source.given}: {name} is no folder and no hub id, so it has no split {source.split!r}",
            "allowed: owner/name#validation, FOLDER#validation",
            "name the files of the split",
        )
    if path.exists():
        if kind_of(path) not in SUFFIXES:
            raise DataError(f"{name}: a file ending in {path.suffix!r}", f"allowed: {ALLOWED_FILES}")
        return Found([path], [])
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True)) if glob.has_magic(name) else []
    files = [match for match in matches if match.is_file() and kind_of(match) in SUFFIXES]
    if files:
        return Found(files, _not_read(name, [match for match in matches if match.is_file() and match not in files]))
    raise DataError(
        f"{name}: no such file" if not glob.has_magic(name) else f"{name}: no file of this pattern",
        f"allowed: {ALLOWED_FILES}, a folder of them, a hub id owner/name, or builtin:pydoc",
        f"looked in {path.parent.resolve()}",
    )


def _find_in_folder(source: DataSource, folder: Path, is_row: IsRow) -> Found:
    """All files of rows in a folder, and in those inside it, or those of one split; its text files where there are no
    others, or its pictures where a bare text is no row."""
    name = source.name
    inside = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    visible = [path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    rows = [path for path in visible if kind_of(path) in SUFFIXES and kind_of(path) not in TEXT_SUFFIXES]
    texts = [path for path in visible if kind_of(path) in TEXT_SUFFIXES]
    pictures = [path for path in visible if path.suffix.lower() in PICTURE_SUFFIXES]
    files = rows or ([] if pictures and not is_row({"text": ""}) else texts)
    if not files and pictures:
        return _pictures_in(
            source, folder, pictures, _not_read(name, [path for path in visible if path not in pictures])
        )
    if not files:
        raise DataError(f"{name}: a folder without examples", f"allowed in it: {ALLOWED_FILES}")
    if source.split is not None:
        files = _of_split(source, folder, files)
    held_out = [path for path in files if HELD_OUT_NAME.search(str(path.relative_to(folder)).lower())]
    if 0 < len(held_out) < len(files) and source.split is None:
        raise DataError(
            f"{name}: a folder that holds {held_out[0].name} beside others",
            "needed: examples to train on; held-out ones go to --validation-data",
            f"name the files to train on, as in --data '{folder / 'train*'}'",
        )
    beside = pictures if any(path.stem == METADATA for path in files) else []
    return Found(files, _not_read(name, [path for path in visible if path not in (*files, *beside)]))


def _pictures_in(source: DataSource, folder: Path, pictures: Sequence[Path], notices: list[str]) -> Found:
    """The pictures in the folders of classes, or in those of one split.

    Raises:
        DataError: there is no such split, or there are several and none is named.
    """
    tops = {path.relative_to(folder).parts[0] for path in pictures}
    splits = {SPLIT_WORDS[top.lower()]: top for top in tops if top.lower() in SPLIT_WORDS}
    wanted = SPLIT_WORDS.get(str(source.split), source.split)
    if source.split is None and len(splits) == len(tops) == 1:
        wanted = next(iter(splits))
    if wanted is None and len(splits) < max(2, len(tops)):
        return Found([folder], notices, tuple(pictures))
    if wanted not in splits:
        raise DataError(
            f"{source.given}: {'no split named' if wanted is None else f'no folder of a split {source.split!r}'}",
            f"its folders: {', '.join(sorted(tops)[:20])}",
            f"name one of its splits, as in --data '{folder}#train' --validation-data '{folder}#test'",
        )
    root = folder / splits[str(wanted)]
    return Found([root], notices, tuple(path for path in pictures if path.is_relative_to(root)))


def _of_split(source: DataSource, folder: Path, files: Sequence[Path]) -> list[Path]:
    splits = {path: _split_named(path.relative_to(folder)) for path in files}
    wanted = SPLIT_WORDS.get(str(source.split), source.split)
    if found := [path for path in files if splits[path] == wanted]:
        return found
    there = Counter(split for split in splits.values() if split is not None)
    counted = ", ".join(f"{split} ({count} {'file' if count == 1 else 'files'})" for split, count in there.items())
    slice_ = "; slices are read of hub ids and saved data sets only" if "[" in str(source.split) else ""
    raise DataError(
        f"{source.given}: no file of a split {source.split!r}{slice_}",
        f"its files are of: {counted or 'no split, by their names'}",
        f"name the files, as in --data '{folder / 'train*'}'",
    )


def _split_named(path: Path) -> str | None:
    """The split that a file's name, or else the innermost of its folders', says."""
    if shard := SHARD.match(path.name):
        return shard[1]
    for part in reversed(path.parts):
        words = (SPLIT_WORDS.get(word) for word in re.split("[^a-z]+", part.lower()))
        if (split := next(filter(None, words), None)) is not None:
            return split
    return None


def _not_read(name: str, paths: Sequence[Path]) -> list[str]:
    return [f"{name}: not read: {', '.join(path.name for path in paths[:5])}."] if paths else []


def check_each_once(paths: Sequence[Path]) -> None:
    """Refuse a file that is named twice.

    Raises:
        DataError: one is.
    """
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise DataError(
            f"{twice[0]} is named twice", "needed: each file once", "to weigh it more, give weights: --data FILE:WEIGHT"
        )
