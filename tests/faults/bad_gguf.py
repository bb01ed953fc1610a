"""Bad GGUF files, and the pieces that they are made of."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bad_file import MEGABYTES_2, BadFile, Build

U32, STRING, ARRAY = 4, 8, 9


def gguf_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf_pair(key: bytes, kind: int, value: bytes) -> bytes:
    return gguf_string(key) + struct.pack("<I", kind) + value


def gguf_tensor(name: bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    shape = b"".join(struct.pack("<Q", size) for size in dims)
    return gguf_string(name) + struct.pack("<I", len(dims)) + shape + struct.pack("<IQ", kind, offset)


LLAMA = gguf_pair(b"general.architecture", STRING, gguf_string(b"llama"))


def gguf_bytes(pairs: list[bytes], tensors: list[bytes], **other: Any) -> bytes:
    """A GGUF file with 4 KiB of data; `other` puts false counts, version or magic."""
    counts = struct.pack("<QQ", other.get("num_tensors", len(tensors)), other.get("num_pairs", len(pairs)))
    head = other.get("magic", b"GGUF") + struct.pack("<I", other.get("version", 3)) + counts
    head += b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(4096)


def gguf_file(content: bytes) -> Build:
    def build(folder: Path, model: Path) -> list[str]:
        (folder / "m.gguf").write_bytes(content)
        return ["quantize", "--model", str(folder / "m.gguf"), "--out", str(folder / "out")]

    return build


def gguf_cases() -> Iterator[BadFile]:
    tensor = gguf_tensor(b"token_embd.weight", [32, 4])
    good = gguf_bytes([LLAMA], [tensor])
    contents = {
        f"cut to {length}": good[:length] for length in (0, 1, 4, 8, 16, 24, 30, 60, 100, 120, len(good) - 4096)
    }

    def with_pair(kind: int, value: bytes, key: bytes = b"x") -> bytes:
        return gguf_bytes([LLAMA, gguf_pair(key, kind, value)], [tensor])

    def with_tensor(*args: Any) -> bytes:
        return gguf_bytes([LLAMA], [gguf_tensor(*args)])

    contents |= {
        "magic": gguf_bytes([LLAMA], [tensor], magic=b"GGML"),
        "big-endian": gguf_bytes([LLAMA], [tensor], version=3 << 24),
        "version 1": gguf_bytes([LLAMA], [tensor], version=1),
        "version 99": gguf_bytes([LLAMA], [tensor], version=99),
        "endless pairs": gguf_bytes([LLAMA], [tensor], num_pairs=2**63),
        "endless tensors": gguf_bytes([LLAMA], [tensor], num_tensors=2**63),
        "one pair too many": gguf_bytes([LLAMA], [tensor], num_pairs=2),
        "one tensor too many": gguf_bytes([LLAMA], [tensor], num_tensors=2),
        "endless key": gguf_bytes([struct.pack("<Q", 2**63)], [tensor]),
        "endless string": with_pair(STRING, struct.pack("<Q", 2**62)),
        "endless array": with_pair(ARRAY, struct.pack("<IQ", U32, 2**60)),
        "endless array of strings": with_pair(ARRAY, struct.pack("<IQ", STRING, 2**60)),
        "array of arrays": with_pair(ARRAY, struct.pack("<IQ", ARRAY, 4)),
        "array of nothing": with_pair(ARRAY, struct.pack("<IQ", 77, 4)),
        "unknown type": with_pair(77, bytes(8)),
        "key twice": gguf_bytes([LLAMA, LLAMA], [tensor]),
        "key not UTF-8": with_pair(U32, bytes(4), b"\xff\xfe"),
        "string not UTF-8": with_pair(STRING, gguf_string(b"\xed\xa0\x80")),
        "no architecture": gguf_bytes([], [tensor]),
        "unknown architecture": gguf_bytes(
            [gguf_pair(b"general.architecture", STRING, gguf_string(b"\x1b[2J"))], [tensor]
        ),
        "number as architecture": gguf_bytes([gguf_pair(b"general.architecture", U32, bytes(4))], [tensor]),
        "one of many parts": with_pair(U32, struct.pack("<I", 7), b"split.count"),
        "text as parts": with_pair(STRING, gguf_string(b"7"), b"split.count"),
        "alignment 0": with_pair(U32, bytes(4), b"general.alignment"),
        "alignment of a text": with_pair(STRING, gguf_string(b"32"), b"general.alignment"),
        "alignment beyond the file": with_pair(U32, struct.pack("<I", 2**31), b"general.alignment"),
        "endless layers": with_pair(U32, struct.pack("<I", 2**32 - 1), b"llama.block_count"),
        "layers of a text": with_pair(STRING, gguf_string(b"2"), b"llama.block_count"),
        "no dimensions": with_tensor(b"a", []),
        "nine dimensions": with_tensor(b"a", [1] * 9),
        "no rows": with_tensor(b"a", [32, 0]),
        "endless rows": with_tensor(b"a", [32, 2**62]),
        "endless everything": with_tensor(b"a", [2**63, 2**63]),
        "unknown tensor type": with_tensor(b"a", [32, 4], 999),
        "tensor type that cannot be read": with_tensor(b"a", [32, 4], 24),
        "odd rows of blocks": with_tensor(b"a", [33, 4], 2),
        "offset beyond the file": with_tensor(b"a", [32, 4], 0, 2**40),
        "offset beyond 64 bits": with_tensor(b"a", [32, 4], 0, 2**64 - 1),
        "tensor twice": gguf_bytes([LLAMA], [tensor, tensor]),
        "no tensors": gguf_bytes([LLAMA], []),
        "no metadata": good,
        "unknown tensor": with_tensor(b"../../x\0", [32, 4]),
        "2 MB of NULs": b"GGUF" + struct.pack("<IQQ", 3, 10**6, 10**6) + bytes(MEGABYTES_2),
    }
    for name, content in contents.items():
        yield BadFile(f"gguf: {name}", gguf_file(content), ("m.gguf",))
