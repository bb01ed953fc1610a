"""The GGUF reader against the gguf package, and against damaged files."""

import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from nybble.errors import ModelError
from nybble.formats.gguf import GgufFile


def write_gguf(file: Path, tensors: dict[str, tuple[np.ndarray, str]], arch: str = "llama", **metadata: object) -> Path:
    writer = gguf.GGUFWriter(file, arch)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "ü" * 50])
    writer.add_array("some.numbers", [1, 2, 3])
    for key, value in metadata.items():
        key = key.replace("__", ".")
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_float32(key, value)
    for name, (array, type_name) in tensors.items():
        block_type = gguf.GGMLQuantizationType[type_name]
        writer.add_tensor(name, gguf.quantize(array, block_type), raw_dtype=block_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_tensors_equal_those_of_the_gguf_package(tmp_path: Path, type_name: str) -> None:
    values = np.random.default_rng(0).standard_normal((70, 96)).astype(np.float32)
    file = write_gguf(tmp_path / "m.gguf", {"w": (values, type_name), "v": (values[0], "F32")})
    ours, theirs = GgufFile(file), gguf.GGUFReader(file)
    for tensor in theirs.tensors:
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(ours.read(tensor.name), expected)
        assert torch.equal(ours.read(tensor.name, torch.bfloat16), expected.bfloat16())
    assert ours.entries["w"].dtype == type_name
    assert ours.metadata["tokenizer.ggml.tokens"] == 3
    assert next(iter(ours.block_types)) == type_name


def test_a_tensor_is_widened_panel_by_panel_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_normal((70, 96)).astype(np.float32)
    file = GgufFile(write_gguf(tmp_path / "m.gguf", {"w": (values, "Q4_1")}))
    whole = file.read("w")
    monkeypatch.setattr("nybble.formats.gguf.PANEL_ELEMENTS", 96 * 9)
    assert torch.equal(file.read("w"), whole)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", {"w": (np.ones((2, 32), np.float32), "Q4_0")})
    content = file.read_bytes()
    end = GgufFile(file).entries["w"].end  # the writer pads what follows
    for length in range(end):
        file.write_bytes(content[:length])
        with pytest.raises(ModelError):
            GgufFile(file)


def test_random_damage_is_refused_or_read(tmp_path: Path) -> None:
    """No byte of the header can bring about anything but a ModelError, or a file that still reads."""
    file = write_gguf(tmp_path / "m.gguf", {"w": (np.ones((2, 32), np.float32), "Q4_0")})
    content = file.read_bytes()
    random = np.random.default_rng(0)
    outcomes = set()
    for position in range(len(content) - 64):
        damaged = bytearray(content)
        damaged[position] = random.integers(256)
        file.write_bytes(damaged)
        try:
            opened = GgufFile(file)
            for name in opened.entries:
                opened.read(name)
            outcomes.add("read")
        except ModelError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_one_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"one of 3 parts(.|\n)*llama-gguf-split --merge"):
        GgufFile(write_gguf(tmp_path / "m.gguf", {}, split__count=3))


def test_a_big_endian_file_is_called_that(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"is big-endian(.|\n)*gguf-convert-endian .*big.gguf little"):
        GgufFile(tmp_path / "big.gguf")


@pytest.mark.parametrize("version", [1, 4])
def test_another_version_is_called_that(tmp_path: Path, version: int) -> None:
    file = write_gguf(tmp_path / "m.gguf", {})
    file.write_bytes(b"GGUF" + version.to_bytes(4, "little") + file.read_bytes()[8:])
    with pytest.raises(ModelError, match=rf"of version {version}(.|\n)*version 2 or 3") as caught:
        GgufFile(file)
    assert "complete" not in str(caught.value)


def test_arrays_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    file = GgufFile(write_gguf(tmp_path / "m.gguf", {}))
    assert file.array("tokenizer.ggml.tokens") == ["a", "bc", "ü" * 50]
    assert file.array("some.numbers") == [1, 2, 3] and file.array("others") == []


def test_a_block_type_that_is_not_known_is_named(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", {"w": (np.zeros((2, 4), np.float32), "F32")})
    content = file.read_bytes()
    at = content.index(b"w\x02\x00\x00\x00") + 1 + 4 + 16  # behind the name: dimensions, their lengths, the type
    file.write_bytes(content[:at] + (99).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(ModelError, match=r"the block type 99, which(.|\n)*Readable: F32"):
        GgufFile(file)


def test_a_type_that_cannot_be_widened_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "i.gguf", "llama")
    writer.add_tensor("w", np.zeros((2, 4), np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"stores the tensor .w. in I32(.|\n)*Readable: F32"):
        GgufFile(tmp_path / "i.gguf")


def test_an_unknown_architecture_is_named_with_those_supported(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'falcon'(.|\n)*llama, qwen2, qwen3"):
        GgufFile(write_gguf(tmp_path / "m.gguf", {}, arch="falcon"))


def test_llama3_scaling_is_recognised_by_its_divisors(tmp_path: Path) -> None:
    config = LlamaConfig(
        rope_parameters={
            "rope_theta": 500000.0,
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        hidden_size=128,
        num_attention_heads=2,
    )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    file = GgufFile(write_gguf(tmp_path / "m.gguf", {"rope_freqs.weight": ((plain / scaled).numpy(), "F32")}))
    read = LlamaConfig(hidden_size=128, num_attention_heads=2)
    read.rope_parameters = {"rope_theta": 500000.0, "rope_type": "default"}
    file.complete_config(read)
    again, _ = ROPE_INIT_FUNCTIONS["llama3"](read, None)
    torch.testing.assert_close(again, scaled)

    unknown = write_gguf(tmp_path / "n.gguf", {"rope_freqs.weight": (np.linspace(1, 9, 32).astype(np.float32), "F32")})
    with pytest.raises(ModelError, match="not Llama 3's"):
        GgufFile(unknown).complete_config(read)


def test_config_gets_what_transformers_leaves_out(tmp_path: Path) -> None:
    keys = {"qwen3__attention__key_length": 48, "qwen3__rope__scaling__type": "yarn"}
    keys |= {"qwen3__rope__scaling__factor": 4.0, "qwen3__rope__scaling__original_context_length": 1024}
    config = Qwen3Config(hidden_size=64)
    GgufFile(write_gguf(tmp_path / "m.gguf", {}, arch="qwen3", **keys)).complete_config(config)
    assert config.head_dim == 48
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["factor"] == 4.0
    assert config.rope_parameters["original_max_position_embeddings"] == 1024

    file = write_gguf(tmp_path / "n.gguf", {}, arch="qwen3", qwen3__rope__scaling__type="longrope")
    with pytest.raises(ModelError, match="'longrope'"):
        GgufFile(file).complete_config(config)


def test_block_type_sizes_hold_for_k_quants(tmp_path: Path) -> None:
    """gguf cannot quantise to these; random bytes widen alike in both readers."""
    for block_type in (gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q6_K):
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[block_type]
        raw = np.random.default_rng(0).integers(0, 60, (3, 2 * block_bytes), dtype=np.uint8)
        writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
        writer.add_tensor("w", raw, raw_dtype=block_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        file = GgufFile(tmp_path / "k.gguf")
        assert file.entries["w"].shape == (3, 2 * block_size)
        expected = torch.from_numpy(gguf.dequantize(raw, block_type))
        assert math.isfinite(float(expected.abs().sum()))
        assert torch.equal(file.read("w"), expected)
