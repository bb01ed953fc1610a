"""The reader and writer against the safetensors package, and against damaged files."""

import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.errors import ModelError
from nybble.formats.safetensors import (
    DTYPES,
    INDEX_NAME,
    RESERVED_HEADER_BYTES,
    SINGLE_NAME,
    SafetensorsFolder,
    SafetensorsWriter,
    sampled_sha256,
    staged_folder,
)


def example_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(33, 7, generator=generator).bfloat16(),
        "b.weight": torch.randn(5, 6, 7, generator=generator),
        "c": torch.randn(9, generator=generator).half(),
        "codes": torch.arange(11, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(3, dtype=torch.int64),
    }


def assert_same(folder: SafetensorsFolder, tensors: dict[str, torch.Tensor]) -> None:
    assert set(folder.entries) == set(tensors)
    for name, tensor in tensors.items():
        read = folder.read(name)
        assert read.dtype == tensor.dtype == DTYPES[folder.entries[name].dtype]
        assert read.shape == tensor.shape == folder.entries[name].shape
        assert torch.equal(read, tensor), name


def write_raw(file: Path, header: bytes | dict, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(shape: list[int], begin: int, end: int, dtype: str = "U8") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    safetensors.torch.save_file(example_tensors(), tmp_path / SINGLE_NAME, metadata={"format": "pt"})
    assert_same(SafetensorsFolder(tmp_path), example_tensors())
    assert_same(SafetensorsFolder(tmp_path / SINGLE_NAME), example_tensors())


def test_safetensors_reads_what_we_wrote(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path) as writer:
        for name, tensor in example_tensors().items():
            writer.write(name, tensor)
    assert [file.name for file in tmp_path.iterdir()] == [SINGLE_NAME]
    with safetensors.safe_open(tmp_path / SINGLE_NAME, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    loaded = safetensors.torch.load_file(tmp_path / SINGLE_NAME)
    assert_same(SafetensorsFolder(tmp_path), loaded)
    assert_same(SafetensorsFolder(tmp_path), example_tensors())


def test_a_non_contiguous_tensor_is_written_in_its_order(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    with SafetensorsWriter(tmp_path) as writer:
        writer.write("t", matrix.T)
    assert torch.equal(safetensors.torch.load_file(tmp_path / SINGLE_NAME)["t"], matrix.T)


def test_shards_are_split_by_size_and_indexed(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.full((100,), float(i)) for i in range(5)} | {"large": torch.ones(1000)}
    with SafetensorsWriter(tmp_path, max_shard_bytes=900) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert sorted(set(index["weight_map"].values())) == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert_same(SafetensorsFolder(tmp_path), tensors)
    for name, file in index["weight_map"].items():
        assert torch.equal(safetensors.torch.load_file(tmp_path / file)[name], tensors[name])


def test_a_full_header_starts_another_shard(tmp_path: Path) -> None:
    names = [f"{'x' * 1000}.{i}" for i in range(RESERVED_HEADER_BYTES // 1000 + 10)]
    with SafetensorsWriter(tmp_path) as writer:
        for i, name in enumerate(names):
            writer.write(name, torch.tensor([i]))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert_same(SafetensorsFolder(tmp_path), {name: torch.tensor([i]) for i, name in enumerate(names)})
    for file in tmp_path.glob("*.safetensors"):
        safetensors.torch.load_file(file)


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), staged_folder(out) as staging, SafetensorsWriter(staging) as writer:
        writer.write("t", torch.ones(3))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_staged_folder_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with staged_folder(out) as staging:
        (staging / "file").write_text("content")
        assert not out.exists()
    assert [file.name for file in out.parent.iterdir()] == ["out"]
    assert (out / "file").read_text() == "content"


def test_a_folder_in_use_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ModelError, match="not empty"), staged_folder(tmp_path):
        pass
    assert (tmp_path / "file").read_text() == "precious"


def test_the_digest_sees_names_shapes_and_bytes(tmp_path: Path) -> None:
    def digest(name: str, tensor: torch.Tensor) -> str:
        safetensors.torch.save_file({name: tensor}, tmp_path / SINGLE_NAME)
        return sampled_sha256(SafetensorsFolder(tmp_path).entries.values())

    changed = torch.zeros(100_000)
    changed[-1] = 1
    digests = [
        digest("t", torch.zeros(100_000)),
        digest("u", torch.zeros(100_000)),
        digest("t", torch.zeros(100, 1000)),
        digest("t", changed),
        digest("t", torch.zeros(200_000).half()),
    ]
    assert len(set(digests)) == len(digests)
    assert digest("t", torch.zeros(100_000)) == digests[0]


# ---- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""])
def test_an_index_cannot_point_out_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "other.safetensors").write_bytes(b"")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"t": name}}))
    with pytest.raises(ModelError, match="plain file name"):
        SafetensorsFolder(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"t": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors is missing"):
        SafetensorsFolder(tmp_path)


def test_an_index_that_names_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"t": torch.ones(2)}, tmp_path / "one.safetensors")
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"t": "one.safetensors", "u": "one.safetensors"}}))
    with pytest.raises(ModelError, match=r"'u' in one\.safetensors, which does not hold it"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": []}', '{"weight_map": {"t": 1}}', "{"])
def test_a_malformed_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(ModelError, match=INDEX_NAME):
        SafetensorsFolder(tmp_path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / SINGLE_NAME
    safetensors.torch.save_file({"t": torch.ones(16), "u": torch.ones(3)}, file)
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(ModelError, match=SINGLE_NAME):
            SafetensorsFolder(tmp_path)
    file.write_bytes(content + b"\0")
    with pytest.raises(ModelError, match="trailing"):
        SafetensorsFolder(tmp_path)


def test_a_shard_that_shrinks_after_it_was_opened_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / SINGLE_NAME
    safetensors.torch.save_file({"t": torch.ones(16)}, file)
    folder = SafetensorsFolder(tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="where 1 more were due"):
        folder.read("t")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"t": entry([4], 0, 3)}, "does not fit"),
        ({"t": entry([4], 0, 4), "u": entry([4], 2, 6)}, "where byte"),  # overlap
        ({"t": entry([4], 0, 4), "u": entry([4], 6, 10)}, "where byte"),  # hole
        ({"t": entry([4], -4, 0)}, "natural number"),
        ({"t": entry([-2, -2], 0, 4)}, "natural number"),
        ({"t": entry([True], 0, 1)}, "natural number"),
        ({"t": entry([1 << 40, 1 << 40], 0, 1 << 80)}, "truncated"),
        ({"t": entry([4], 0, 4, "Q9")}, "dtype 'Q9'"),
        ({"t": 7}, "malformed"),
        ({"t": {"dtype": "U8", "shape": [4]}}, "malformed"),
        ({"t": {"dtype": "U8", "shape": None, "data_offsets": [0, 4]}}, "malformed"),
        (b'{"t": {"dtype":"U8","shape":[4],"data_offsets":[0,4]}, "t": 1}', "duplicate key 't'"),
        (b"[]", "malformed"),
        (b"[" * 100_000, "malformed"),
        (b"\xff\xfe", "malformed"),
    ],
)
def test_a_malformed_header_is_refused(tmp_path: Path, header: bytes | dict, message: str) -> None:
    write_raw(tmp_path / SINGLE_NAME, header, b"\0" * 10)
    with pytest.raises(ModelError, match=message):
        SafetensorsFolder(tmp_path)


def test_a_header_longer_than_its_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / SINGLE_NAME).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(ModelError, match="claims a header of"):
        SafetensorsFolder(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in ("one.safetensors", "two.safetensors"):
        safetensors.torch.save_file({"t": torch.ones(2), name: torch.ones(1)}, tmp_path / name)
    weight_map = {name: name for name in ("one.safetensors", "two.safetensors")}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match="one shard only"):
        SafetensorsFolder(tmp_path)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_random_damage_is_read_right_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever bytes change: either the safetensors package agrees with us, or we raise ModelError."""
    file = tmp_path_factory.mktemp("fuzz") / SINGLE_NAME
    safetensors.torch.save_file({"t": torch.arange(8.0), "u": torch.ones(2, 3).half()}, file)
    content = bytearray(file.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        ours = SafetensorsFolder(file)
    except ModelError:
        return
    theirs = safetensors.torch.load(bytes(content))
    assert set(ours.entries) == set(theirs)
    for name, tensor in theirs.items():
        read = ours.read(name)
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert read.numpy().tobytes() == tensor.numpy().tobytes()
