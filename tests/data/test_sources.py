"""What --data names beside files: splits, weights, and names that only look like them."""

import bz2
import gzip
import json
import lzma
from fractions import Fraction
from pathlib import Path

import datasets
import pyarrow
import pytest

from nybble.data import dataset_rows
from nybble.data.dataset_rows import hub_rows
from nybble.data.readers import read_examples
from nybble.data.sources import DataSource, parse_sources
from nybble.errors import DataError


def pairs(count: int, word: str = "q") -> list[dict[str, str]]:
    return [{"prompt": f"{word} {n}", "completion": f"a {n}"} for n in range(count)]


def lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, word in (("train-00000-of-00001", "t"), ("validation-00000-of-00001", "v")):
        (tmp_path / "set").mkdir(exist_ok=True)
        datasets.Dataset.from_list(pairs(20, word)).to_parquet(str(tmp_path / "set" / f"{name}.parquet"))
    return tmp_path


def prompts(source: str) -> list[str | None]:
    return [example.prompt for example in read_examples(source).examples]


# ---- splits


def test_the_split_of_a_folder_is_told_by_the_names_of_its_files(folder):
    assert prompts("set#validation") == prompts("set#val") == [f"v {n}" for n in range(20)]
    assert prompts("set#train") == [f"t {n}" for n in range(20)]
    for name in ("deep/test/a.jsonl", "deep/train/b.jsonl", "deep/test_sft-00000-of-00001.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(lines(pairs(2, name[5:11])))
    assert prompts("deep#train") == ["train/ 0", "train/ 1"]
    assert prompts("deep#test_sft") == ["test_s 0", "test_s 1"]


@pytest.mark.parametrize(
    "source, message",
    [
        ("set#dev2", r"no file of a split 'dev2'(?s:.*)train \(1 file\), validation \(1 file\)"),
        ("set#train[:5]", "slices are read of hub ids and saved data sets only"),
        ("set/train-00000-of-00001.parquet#train", "no folder and no hub id"),
        ("absent.jsonl#train", "no split 'train'"),
    ],
)
def test_a_split_that_is_not_there_says_which_are(folder, source, message):
    with pytest.raises(DataError, match=message):
        read_examples(source)


def test_a_saved_data_set(folder):
    splits = {name: datasets.Dataset.from_list(pairs(10, name)) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk("saved")
    splits["train"].save_to_disk("one")
    assert prompts("saved#test") == [f"test {n}" for n in range(10)] and prompts("one") == prompts("saved#train")
    read = read_examples("saved#test[20%:40%]+train[-1:]").examples
    assert [e.origin for e in read] == ["saved#test:3", "saved#test:4", "saved#train:10"]
    with pytest.raises(DataError, match=r"no split 'dev'(?s:.*)its splits: train, test"):
        read_examples("saved#dev")


@pytest.fixture
def hub(folder, monkeypatch):
    """`datasets` takes the folder for the hub's; numbers of rows are as the hub's are where a set's card says none."""
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *args, **more: load(name.split("/")[1], *args, **more))
    return lambda name: [(origin, row["prompt"]) for origin, row in hub_rows(parse_sources([name])[0])]


def test_splits_of_the_hub(hub):
    assert hub("owner/set") == [(f"owner/set:{n + 1}", f"t {n}") for n in range(20)]
    assert hub("owner/set#validation[3:5]") == [(f"owner/set#validation:{n + 1}", f"v {n}") for n in (3, 4)]
    assert hub("owner/set#train[:1]+validation[19:]") == [
        ("owner/set#train:1", "t 0"),
        ("owner/set#validation:20", "v 19"),
    ]
    with pytest.raises(DataError, match=r"no split 'test'(?s:.*)train, validation(?s:.*)owner/set#train"):
        hub("owner/set#test")
    with pytest.raises(DataError, match="number of rows is not said"):
        hub("owner/set#train[:10%]")
    with pytest.raises(DataError, match="allowed: a split, or a slice"):
        hub("owner/set#train[:x]")


def test_a_set_of_the_hub_without_the_usual_split_says_which_it_has():
    held = {"test": datasets.Dataset.from_list(pairs(2))}
    source = DataSource("owner/set", "owner/set", None, None)
    with pytest.raises(DataError, match=r"no split 'train'(?s:.*)owner/set#test"):
        list(dataset_rows.split_rows(source, held, {"test": 2}))


# ---- weights


def test_weights_are_behind_the_last_colon(folder):
    (folder / "a.jsonl").write_bytes(lines(pairs(3)))
    parsed = parse_sources(["a.jsonl:0.7", "owner/name:config#train[:9]:.2", "builtin:pydoc:1", r"C:\x.jsonl:2"])
    assert [(source.name, source.split, source.weight) for source in parsed] == [
        ("a.jsonl", None, Fraction(7, 10)),
        ("owner/name:config", "train[:9]", Fraction(1, 5)),
        ("builtin:pydoc", None, 1),
        (r"C:\x.jsonl", None, 2),
    ]
    assert parse_sources(["owner/name:2024#train"]) == [("owner/name:2024#train", "owner/name:2024", "train", None)]
    assert parse_sources(["owner/name:sub"])[0].weight is None


def test_names_with_colons_and_hashes_that_exist_are_files(folder):
    for name in ("a:0.5", "b#c.jsonl", "d:1.jsonl"):
        (folder / name).write_bytes(lines(pairs(1)))
    assert [(s.name, s.split, s.weight) for s in parse_sources(["a:0.5", "b#c.jsonl", "d:1.jsonl", "d*:1.jsonl"])] == [
        (name, None, None) for name in ("a:0.5", "b#c.jsonl", "d:1.jsonl", "d*:1.jsonl")
    ]
    assert parse_sources(["a:0.5:3", "b#c.jsonl:1"])[0].weight == 3


@pytest.mark.parametrize(
    "given, message",
    [
        (["a.jsonl:-1", "set#train:1"], "its weight is -1"),
        (["a.jsonl:0", "set#train:0.0"], "a weight above 0"),
        (["a.jsonl:half", "set#train:1"], "its weight is 'half'(?s:.*)a number"),
        (["a.jsonl:nan", "set#train:1"], "its weight is 'nan'"),
        (["a.jsonl:1", "set#train:inf"], "set#train: its weight is 'inf'"),
        (["a.jsonl:1e5", "set#train:1"], "its weight is '1e5'"),
        (["a.jsonl:1", "set#train"], "set#train: no weight, and others have one"),
        (["a.jsonl:1"], "nothing beside it"),
    ],
)
def test_weights_that_are_none(folder, given, message):
    (folder / "a.jsonl").write_bytes(lines(pairs(3)))
    with pytest.raises(DataError, match=message):
        read_examples(given)


# ---- archives


@pytest.mark.parametrize("suffix", ("gz", "bz2", "xz", "zst"))
def test_archives_in_folders_and_patterns_and_damaged_ones(folder, suffix):
    content = lines(pairs(4000))
    with pyarrow.output_stream(str(folder / "packed.zst"), compression="zstd") as file:
        file.write(content)
    packed = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": lambda _: (folder / "packed.zst").read_bytes(),
    }[suffix](content)
    (folder / "in").mkdir()
    (folder / "in" / f"a.jsonl.{suffix}").write_bytes(packed)
    assert prompts("in") == prompts(f"in/*.{suffix}") == [f"q {n}" for n in range(4000)]
    for place in (len(packed) // 2, len(packed) - 3):
        (folder / "in" / f"a.jsonl.{suffix}").write_bytes(packed[:place])
        with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix}: damaged as "):
            read_examples("in")
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 255
    (folder / "in" / f"a.jsonl.{suffix}").write_bytes(flipped)
    with pytest.raises(DataError):
        read_examples("in")
