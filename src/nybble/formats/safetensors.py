"""safetensors on disk: a lazy, checking reader of one file or a shard set, and a streaming writer.

Reading: headers are parsed and checked when the reader is made (sizes against the file, offsets
against each other), tensor bytes only when asked for, one tensor at a time, into fresh memory. No
file is mapped: a shard that shrinks while it is read is an error here and not a bus error, and a
tensor's bytes are gone when the tensor is.

Writing: tensors go to disk as they come, so that a model never has to exist in memory. The header
of a safetensors file comes first but is known last; room is left for it and filled with spaces,
which the format allows. `staged_folder` makes the whole folder appear at once or not at all.

Format: 8 bytes little-endian header length | JSON header | tensor bytes without holes.
Source: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from nybble.errors import ModelError
from nybble.files.disk import fsync

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
RESERVED_HEADER_BYTES = 256 * 1024  # some 1,500 tensors; a shard ends when this or its data is full
SAMPLE_BYTES, SAMPLES = 4096, 16

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where one stored tensor lies.

    Args:
        name: as the file names it.
        dtype: as the file names it, for instance "BF16" (safetensors) or "Q4_1" (GGUF).
        shape: row-major, outermost dimension first.
        file: that holds it.
        start, end: byte range in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def row_entry(entry: TensorEntry, index: int) -> TensorEntry:
    """Where the index-th of a tensor's first dimension lies."""
    row_bytes = entry.nbytes // entry.shape[0]
    start = entry.start + index * row_bytes
    return replace(entry, shape=entry.shape[1:], start=start, end=start + row_bytes)


class SafetensorsFolder:
    """The tensors of a folder (single file or shard set with an index) or of one file.

    Args:
        path: a folder that holds `model.safetensors` or `model.safetensors.index.json`, or a file.

    Raises:
        ModelError: a shard is missing, truncated, malformed or outside the folder.
    """

    def __init__(self, path: Path | str):
        path = Path(path)
        self.files = [path] if path.is_file() else _shard_files(path)
        self.entries: dict[str, TensorEntry] = {}
        for file in self.files:
            for entry in _read_header(file):
                if entry.name in self.entries:
                    raise ModelError(
                        f"The tensor {entry.name!r} is in both {self.entries[entry.name].file.name} and {file.name} of "
                        f"{file.parent}.",
                        "A tensor is allowed in one shard only.",
                        "Fetch or save the model again.",
                    )
                self.entries[entry.name] = entry
        if path.is_dir() and (path / INDEX_NAME).is_file():
            _check_index(path, self.entries)

    def read(self, name: str) -> Tensor:
        """One tensor, in fresh memory that nothing else refers to."""
        return self.read_entry(self.entries[name])

    def read_entry(self, entry: TensorEntry) -> Tensor:
        """What lies there, in fresh memory."""
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        read_exactly(entry.file, entry.start, buffer.numpy().data)
        return buffer.view(DTYPES[entry.dtype]).view(entry.shape)


class MatrixFile:
    """A stored matrix whose rows are read where they are used.

    Args:
        entry: of two dimensions, in a type that torch has.

    Raises:
        ModelError: reading fails, or ends too soon.
    """

    def __init__(self, entry: TensorEntry):
        self.entry, self.dtype = entry, DTYPES[entry.dtype]
        self.num_rows, self.num_columns = entry.shape
        self.row_bytes = entry.nbytes // self.num_rows

    def read_rows(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        """Rows `start` to `stop` in the front of `buffer`, uint8; `(stop - start, num_columns)`."""
        used = buffer[: (stop - start) * self.row_bytes]
        read_exactly(self.entry.file, self.entry.start + start * self.row_bytes, used.numpy().data)
        return used.view(self.dtype).view(stop - start, self.num_columns)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of an int64 tensor `(N,)`, each read once: `(N, num_columns)`."""
        unique, place = rows.unique(return_inverse=True)
        buffer = torch.empty(len(unique), self.row_bytes, dtype=torch.uint8)
        for row, into in zip(unique.tolist(), buffer, strict=True):
            read_exactly(self.entry.file, self.entry.start + row * self.row_bytes, into.numpy().data)
        return buffer.view(self.dtype)[place]


def read_exactly(file: Path, start: int, *buffers: memoryview) -> None:
    """Fill the buffers, one after another, with the file's bytes from `start`.

    Raises:
        ModelError: the file cannot be opened or read, or ends too soon.
    """
    left = [buffer for buffer in buffers if len(buffer)]
    try:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            while left:
                count = os.preadv(descriptor, left, start)
                if count == 0:
                    raise _damaged(file, f"ends at byte {start} where {sum(map(len, left))} more were due")
                start += count
                while left and count >= len(left[0]):
                    count -= len(left.pop(0))
                if left:
                    left[0] = left[0][count:]
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ModelError(
            f"{file} cannot be read: {error.strerror}.", fix="Check its permissions and its disk."
        ) from error


def sampled_sha256(entries: Iterable[TensorEntry]) -> str:
    """A digest of every tensor's name, type and shape and of up to 16 evenly spread pieces of 4 KiB of its bytes.

    Cheap enough for a 70B model (some 50 MB read). It tells models and fine-tunes of them apart, not a
    change of single bytes between the pieces.
    """
    digest = hashlib.sha256()
    piece = bytearray(SAMPLE_BYTES)
    for entry in sorted(entries, key=lambda entry: entry.name):
        digest.update(json.dumps([entry.name, entry.dtype, entry.shape]).encode())
        length = min(SAMPLE_BYTES, entry.nbytes)
        starts = {entry.start + (entry.nbytes - length) * i // (SAMPLES - 1) for i in range(SAMPLES)}
        for start in sorted(starts):
            read_exactly(entry.file, start, memoryview(piece)[:length])
            digest.update(piece[:length])
    return digest.hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, on the CPU."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _shard_files(folder: Path) -> list[Path]:
    index, single = folder / INDEX_NAME, (folder / SINGLE_NAME).is_file()
    if index.is_file():
        files = sorted(set(_weight_map(index).values()))
        if single and SINGLE_NAME not in files:
            raise ModelError(
                f"{folder} holds {SINGLE_NAME} beside {INDEX_NAME} and the shards that it names.",
                "A model folder holds one of the two; programs differ on which they read.",
                "Remove the one that is not meant.",
            )
        return [_confined(folder, name) for name in files]
    if single:
        return [folder / SINGLE_NAME]
    found = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))) or "none"
    raise ModelError(
        f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME} (safetensors files found: {found}).",
        "A model folder holds one of the two.",
        "Give the folder of a complete model, or fetch the missing file.",
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=object_without_duplicates)
        weight_map = content["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("weight_map is not a map from tensor names to file names")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"{index} is not a readable index of shards ({error}).",
            'Allowed: JSON with a "weight_map" from tensor names to file names.',
            "Fetch the file again.",
        ) from error
    return weight_map


def _confined(folder: Path, name: str) -> Path:
    """`folder / name`, where name must be a plain file name: an index may not point out of its folder."""
    if name in ("", ".", "..") or name != os.path.basename(name) or "\\" in name:
        raise ModelError(
            f"{folder / INDEX_NAME} names the shard {name!r}.",
            "A shard is a plain file name in the same folder.",
            "Fetch the model from a source you trust.",
        )
    if not (folder / name).is_file():
        raise ModelError(
            f"The shard {name} is missing from {folder}; {INDEX_NAME} names it.",
            "Every shard the index names must be there.",
            "Fetch the missing file, or fetch the model again.",
        )
    return folder / name


def _check_index(folder: Path, entries: dict[str, TensorEntry]) -> None:
    for name, file in _weight_map(folder / INDEX_NAME).items():
        if name not in entries or entries[name].file.name != file:
            raise ModelError(
                f"{folder / INDEX_NAME} places the tensor {name!r} in {file}, which does not hold it.",
                "Index and shards must belong together.",
                "Fetch the model again.",
            )


def _damaged(file: Path, what: str) -> ModelError:
    return ModelError(f"{file} {what}.", "Allowed: a complete safetensors file.", "Fetch or save the file again.")


def _read_header(file: Path) -> list[TensorEntry]:
    """The file's tensors in the order of their bytes, every size checked before it is used."""
    file_bytes = file.stat().st_size
    if file_bytes < 8:
        raise _damaged(file, f"has {file_bytes} bytes, too few for a header")
    prefix = bytearray(8)
    read_exactly(file, 0, memoryview(prefix))
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
        raise _damaged(file, f"claims a header of {header_bytes} bytes in a file of {file_bytes}")
    text = bytearray(header_bytes)
    read_exactly(file, 8, memoryview(text))
    try:
        header = json.loads(text, object_pairs_hook=object_without_duplicates)
        header.pop("__metadata__", None)
        entries = [_entry(file, 8 + header_bytes, name, info) for name, info in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise _damaged(file, f"has a malformed header ({error})") from error
    entries.sort(key=lambda entry: (entry.start, entry.end))
    expected = 8 + header_bytes
    for entry in entries:
        if entry.start != expected:
            raise _damaged(file, f"places {entry.name!r} at byte {entry.start} where byte {expected} is due")
        expected = entry.end
    if file_bytes != expected:
        kind = "is truncated: it" if file_bytes < expected else "has trailing bytes: it"
        raise _damaged(file, f"{kind} has {file_bytes} bytes and its header describes {expected}")
    return entries


def object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key given twice: a hook for `json.loads`, which by itself silently takes the last value."""
    unique = dict(pairs)
    if len(unique) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"duplicate key {next(name for name, count in counts.items() if count > 1)!r}")
    return unique


def _entry(file: Path, data_start: int, name: str, info: dict[str, Any]) -> TensorEntry:
    dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
    if dtype not in DTYPES:
        raise ModelError(
            f"{file}: the tensor {name!r} has dtype {dtype!r}.",
            f"Readable: {', '.join(DTYPES)}.",
            "Convert the model to 16 bits.",
        )
    if not all(type(size) is int and size >= 0 for size in (begin, end, *shape)):
        raise ValueError(f"tensor {name!r} has a shape or offset that is not a natural number")
    if end - begin != prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"tensor {name!r} has {end - begin} bytes, which does not fit {dtype} {shape}")
    return TensorEntry(name, dtype, tuple(shape), file, data_start + begin, data_start + end)


class SafetensorsWriter:
    """Writes a shard set into a folder, one tensor at a time, as `with SafetensorsWriter(folder) as writer`.

    Without an error the folder then holds `model.safetensors`, or numbered shards and their index.
    Use it inside `staged_folder`: by itself it leaves partial files behind when interrupted.

    Args:
        folder: exists already.
        max_shard_bytes: of tensor data in a shard; a larger tensor gets a shard of its own.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = 5_000_000_000):
        self.folder, self.max_shard_bytes = folder, max_shard_bytes
        self.total_bytes = 0
        self._weight_map: dict[str, int] = {}  # tensor name -> shard number
        self._num_shards = 0
        self._stream: BinaryIO | None = None
        self._header = b""
        self._data_bytes = 0

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self._finish()
        elif self._stream is not None:
            self._stream.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Append one tensor. Its memory may be reused as soon as this returns."""
        assert name not in self._weight_map and name != "__metadata__", name
        payload = tensor.detach().cpu().contiguous()
        nbytes = payload.numel() * payload.element_size()
        if self._stream is None or (self._data_bytes and self._data_bytes + nbytes > self.max_shard_bytes):
            self._start_shard()
        if len(self._header) + len(self._describe(name, payload, nbytes)) >= RESERVED_HEADER_BYTES:
            self._start_shard()
        assert self._stream is not None
        self._header += self._describe(name, payload, nbytes)  # a new shard counts offsets from zero
        self._stream.write(payload.reshape(-1).view(torch.uint8).numpy().data)
        self._data_bytes += nbytes
        self.total_bytes += nbytes
        self._weight_map[name] = self._num_shards

    def _describe(self, name: str, tensor: Tensor, nbytes: int) -> bytes:
        info = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._data_bytes, self._data_bytes + nbytes],
        }
        return f",{json.dumps(name)}:{json.dumps(info, separators=(',', ':'))}".encode()

    def _start_shard(self) -> None:
        self._end_shard()
        self._num_shards += 1
        self._header, self._data_bytes = b'{"__metadata__":{"format":"pt"}', 0
        self._stream = self._part(self._num_shards).open("wb")
        self._stream.write(RESERVED_HEADER_BYTES.to_bytes(8, "little") + b" " * RESERVED_HEADER_BYTES)

    def _end_shard(self) -> None:
        if self._stream is None:
            return
        self._stream.seek(8)
        self._stream.write(self._header + b"}")
        self._stream.close()
        self._stream = None

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.incomplete"

    def _finish(self) -> None:
        if self._num_shards == 0:
            self._start_shard()
        self._end_shard()
        if self._num_shards == 1:
            os.rename(self._part(1), self.folder / SINGLE_NAME)
            return
        names = {n: f"model-{n:05d}-of-{self._num_shards:05d}.safetensors" for n in range(1, self._num_shards + 1)}
        for number, name in names.items():
            os.rename(self._part(number), self.folder / name)
        index = {
            "metadata": {"total_size": self.total_bytes},
            "weight_map": {tensor: names[number] for tensor, number in sorted(self._weight_map.items())},
        }
        (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_tensors(
    path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """One file of tensors that need not be in memory together: all are described first, then written as they come.

    Wide types come first in the file, so that each tensor begins at a multiple of its element's size, as
    the safetensors library orders them; `SafetensorsWriter`, which does not know what is still to come, cannot.

    Args:
        layout: name -> type and shape.
        tensors: each of them once, in any order; used before the next is asked for.

    Raises:
        OSError: the disk is full or fails.
    """
    places, end = {}, 0
    for name, (dtype, shape) in sorted(layout.items(), key=lambda item: -item[1][0].itemsize):
        places[name], end = (end, end + prod(shape) * dtype.itemsize), end + prod(shape) * dtype.itemsize
    described = {
        name: {"dtype": DTYPE_NAMES[layout[name][0]], "shape": list(layout[name][1]), "data_offsets": list(place)}
        for name, place in places.items()
    }
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for name, tensor in tensors:
            start, end = places.pop(name)
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            assert len(data) == end - start, (name, len(data), end - start)
            stream.seek(8 + len(header) + start)
            stream.write(data.numpy().data)
    assert not places, list(places)


@contextmanager
def staged_folder(out: Path | str) -> Iterator[Path]:
    """A new folder beside `out` to write into; it becomes `out` when the block ends without an error.

    Files and folders are flushed to the disk before the rename, so `out` is either complete or not there.

    Raises:
        ModelError: `out` exists and is not an empty folder, or cannot be created.
    """
    out = Path(out).absolute()
    check_output_free(out)
    staging = out.parent / f".{out.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise ModelError(
            f"{out} cannot be created: {error.strerror}.", fix="Choose a folder in which you may write."
        ) from error
    try:
        yield staging
        for path in sorted(staging.rglob("*")):
            fsync(path)
        fsync(staging)
        os.rename(staging, out)
        fsync(out.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def check_output_free(out: Path | str) -> None:
    """Refuse an output folder that is in use, before any long work.

    Raises:
        ModelError: `out` exists and is not an empty folder.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(
            f"{out} already exists and is not empty.",
            "The output must be a new or empty folder.",
            "Choose another one.",
        )
