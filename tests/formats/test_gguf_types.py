"""Every block type of GGUF files, quantised by llama.cpp and widened as it does, bit for bit."""

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest

from nybble.formats.gguf import GgufFile

NOT_READ = ("Q8_K", "Q1_0", "Q2_0")  # of inputs, not of weights; and two that the gguf package does not widen
ROWS, COLUMNS = 4, 512


def ggml() -> ctypes.CDLL:
    """The library in which llama-cpp-python has ggml's arithmetic of blocks."""
    llama_cpp = pytest.importorskip("llama_cpp")
    library = next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))
    return ctypes.CDLL(str(library))


@pytest.mark.slow
def test_every_type_is_widened_as_llama_cpp_widens_it(tmp_path: Path) -> None:
    library = ggml()
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    weights = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    importance = np.ones(COLUMNS, np.float32)
    writer, expected = gguf.GGUFWriter(tmp_path / "m.gguf", "llama"), {}
    for kind in gguf.GGMLQuantizationType:
        widen = getattr(library, f"dequantize_row_{kind.name.lower().replace('_k', '_K')}", None)
        if widen is None or kind.name in NOT_READ:
            continue
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        packed = np.zeros((ROWS, COLUMNS // block_size * block_bytes), np.uint8)
        library.ggml_quantize_init(int(kind))
        sizes = ctypes.c_int64(0), ctypes.c_int64(ROWS), ctypes.c_int64(COLUMNS)
        data = weights.ctypes.data_as(ctypes.c_void_p), packed.ctypes.data_as(ctypes.c_void_p)
        made = library.ggml_quantize_chunk(int(kind), *data, *sizes, importance.ctypes.data_as(ctypes.c_void_p))
        assert made == packed.nbytes, kind.name
        values = np.empty_like(weights)
        widen(
            packed.ctypes.data_as(ctypes.c_void_p), values.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(weights.size)
        )
        assert 0 < np.square(values - weights).mean() < 0.7, kind.name
        writer.add_tensor(kind.name, packed, raw_dtype=kind)
        expected[kind.name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "m.gguf")
    different = [name for name, values in expected.items() if not np.array_equal(file.read(name).numpy(), values)]
    assert len(expected) >= 22 and not different, (len(expected), different)
