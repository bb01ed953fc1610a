"""bitsandbytes' keys: written by us and read by it, written by it and read by us, and damaged in every part."""

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from nybble.errors import FormatError
from nybble.formats import blockwise, bnb
from nybble.formats.codebooks import codebook
from nybble.formats.format import FORMATS
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.formats.quantized_tensor import QuantizedTensor

DEFAULT = QuantSpec()
NAME = "model.layers.0.mlp.up_proj.weight"
BITSANDBYTES = [format.name for format in FORMATS.values() if format.bitsandbytes]
SHAPES = [(64, 128), (5, 100), (3, 7), (65,), (2, 3, 50), (300, 64)]


def quantized(
    shape: tuple[int, ...] = (6, 100), spec: QuantSpec = DEFAULT, dtype: torch.dtype = torch.float32
) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(3)
    return blockwise.quantize(torch.randn(shape, generator=generator).to(dtype), spec)


def state_key(format: str) -> str:
    return f"{NAME}.quant_state.{'bitsandbytes' if format in ('nf4', 'fp4') else 'nybble'}__{format}"


def with_state(tensors: dict[str, Tensor], format: str = "nf4", **changes: Any) -> dict[str, Tensor]:
    """The same tensors with entries of the state's JSON replaced."""
    state = json.loads(bytes(tensors[state_key(format)].tolist()))
    text = json.dumps(state | changes)
    return tensors | {state_key(format): torch.tensor(list(text.encode()), dtype=torch.uint8)}


def assert_equal(ours: QuantizedTensor, other: QuantizedTensor) -> None:
    assert (ours.spec, ours.shape, ours.dtype) == (other.spec, other.shape, other.dtype)
    assert torch.equal(ours.packed, other.packed) and torch.equal(ours.scales, other.scales)


# ---- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_through_safetensors(shape: tuple[int, ...], double_quant: bool, format: str) -> None:
    for block_size, dtype in ((64, torch.bfloat16), (32, torch.float16), (4096, torch.float32)):
        q = quantized(shape, QuantSpec(format, block_size, double_quant), dtype)
        assert_equal(bnb.from_bnb(NAME, load(save(bnb.to_bnb(NAME, q)))), q)


@pytest.mark.parametrize("format", BITSANDBYTES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bitsandbytes_reads_ours(shape: tuple[int, ...], double_quant: bool, format: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    default = pytest.importorskip("bitsandbytes.backends.default.ops")
    q = quantized(shape, QuantSpec(format, 64, double_quant), torch.bfloat16)
    tensors = bnb.to_bnb(NAME, q)
    packed = tensors.pop(NAME)
    stats = {key.removeprefix(f"{NAME}."): tensor for key, tensor in tensors.items()}
    state = functional.QuantState.from_dict(stats, device=torch.device("cpu"))
    assert (tuple(state.shape), state.dtype, state.blocksize) == (shape, torch.bfloat16, 64)
    absmax = state.absmax
    if double_quant:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    # The formula of its device-independent backend: its CPU kernel is wrong where rows are not whole blocks.
    values = default._dequantize_4bit_compute.__wrapped__(packed.view(-1), absmax, state.code, 64, shape, torch.float32)
    assert torch.equal(values, blockwise.dequantize(q, torch.float32))
    if shape[-1] % 64 == 0:
        assert torch.equal(functional.dequantize_4bit(packed, state), blockwise.dequantize(q, torch.bfloat16))


@pytest.mark.parametrize("format", BITSANDBYTES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_we_read_bitsandbytes(storage: torch.dtype, double_quant: bool, format: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(96, 192, generator=torch.Generator().manual_seed(5)).half()
    packed, state = functional.quantize_4bit(
        w, blocksize=64, quant_type=format, compress_statistics=double_quant, quant_storage=storage
    )
    tensors = {f"{NAME}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    q = bnb.from_bnb(NAME, {NAME: packed, **tensors})
    assert q.spec == QuantSpec(format, 64, double_quant) and q.shape == (96, 192) and q.dtype == torch.float16
    assert torch.equal(blockwise.dequantize(q, torch.float16), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("double_quant", [False, True])
def test_our_tensors_are_named_and_typed_as_those_of_bitsandbytes(double_quant: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(96, 192)
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    theirs = {NAME: packed} | {f"{NAME}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    ours = bnb.to_bnb(NAME, blockwise.quantize(w, QuantSpec("nf4", 64, double_quant)))
    assert {key: (t.dtype, t.shape) for key, t in ours.items()} == {
        key: (t.dtype, t.shape) for key, t in theirs.items()
    }
    assert torch.equal(ours[state_key("nf4")], theirs[state_key("nf4")])


def test_half_precision_scales_are_cast() -> None:
    q = quantized()
    tensors = bnb.to_bnb(NAME, q)
    key = f"{NAME}.nested_absmax"
    tensors[key] = tensors[key].bfloat16()
    offset = q.scale_parts().offset
    assert offset is not None
    tensors = with_state(tensors, nested_offset=offset.bfloat16().item(), nested_dtype="bfloat16")
    parts = bnb.from_bnb(NAME, tensors).scale_parts()
    assert parts.absmax2 is not None and parts.offset is not None
    assert torch.equal(parts.absmax2, tensors[key].float()) and parts.offset[0] == offset.bfloat16().float()[0]

    tensors = bnb.to_bnb(NAME, quantized(spec=QuantSpec("nf4", 64, False)))
    tensors[f"{NAME}.absmax"] = tensors[f"{NAME}.absmax"].half()
    absmax = bnb.from_bnb(NAME, tensors).scale_parts().absmax
    assert absmax is not None and torch.equal(absmax, tensors[f"{NAME}.absmax"].float())


def test_negative_scales_survive() -> None:
    q = quantized(spec=QuantSpec("nf4", 64, False))
    q.scales.view(torch.float32).neg_()
    assert_equal(bnb.from_bnb(NAME, bnb.to_bnb(NAME, q)), q)


def test_is_quantized() -> None:
    tensors = bnb.to_bnb(NAME, quantized())
    assert bnb.is_quantized(NAME, tensors)
    assert not bnb.is_quantized("model.norm.weight", tensors)


# ---- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_each_missing_tensor_is_named(double_quant: bool, format: str) -> None:
    tensors = bnb.to_bnb(NAME, quantized(spec=QuantSpec(format, 64, double_quant)))
    for key in tensors:
        if key == f"{NAME}.nested_absmax":
            continue  # without it the weight reads as not double-quantised, and absmax has the wrong type
        with pytest.raises(FormatError) as error:
            bnb.from_bnb(NAME, {other: tensor for other, tensor in tensors.items() if other != key})
        assert key in str(error.value)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_each_truncated_tensor_is_named(double_quant: bool, format: str) -> None:
    tensors = bnb.to_bnb(NAME, quantized(spec=QuantSpec(format, 64, double_quant)))
    for key, tensor in tensors.items():
        for damaged in (tensor[:-1], torch.cat([tensor, tensor[:1]])):
            with pytest.raises(FormatError) as error:
                bnb.from_bnb(NAME, tensors | {key: damaged})
            assert key in str(error.value)


def test_nested_without_its_scales() -> None:
    tensors = bnb.to_bnb(NAME, quantized())
    del tensors[f"{NAME}.nested_absmax"]
    with pytest.raises(FormatError, match=r"weight\.absmax is torch.uint8"):
        bnb.from_bnb(NAME, tensors)


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_type": "fp4"},
        {"quant_type": None},
        {"blocksize": 48},
        {"blocksize": "64"},
        {"blocksize": 64.0},
        {"blocksize": True},
        {"blocksize": -64},
        {"dtype": "int8"},
        {"dtype": ["float32"]},
        {"dtype": "load"},
        {"shape": None},
        {"shape": []},
        {"shape": [0, 100]},
        {"shape": [-6, -100]},
        {"shape": [6.0, 100]},
        {"shape": [6, 101]},
        {"shape": [10**30, 10**30]},
        {"shape": [1] * 1000},
        {"shape": "6x100"},
        {"nested_blocksize": 128},
        {"nested_offset": None},
        {"nested_offset": "0.1"},
        {"nested_offset": math.nan},
        {"nested_offset": math.inf},
        {"nested_offset": 10**400},
        {"nested_offset": 1e39},
    ],
    ids=str,
)
def test_a_damaged_state_is_refused(changes: dict[str, Any]) -> None:
    tensors = bnb.to_bnb(NAME, quantized())
    bnb.from_bnb(NAME, with_state(tensors))
    with pytest.raises(FormatError, match="up_proj"):
        bnb.from_bnb(NAME, with_state(tensors, **changes))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 20_000, b" " * 100_000], ids=len)
def test_a_state_that_is_not_a_json_object_is_refused(text: bytes) -> None:
    tensors = bnb.to_bnb(NAME, quantized())
    tensors[state_key("nf4")] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(FormatError, match="quant_state"):
        bnb.from_bnb(NAME, tensors)


def test_two_states_are_refused() -> None:
    tensors = bnb.to_bnb(NAME, quantized())
    tensors[state_key("fp4")] = tensors[state_key("nf4")]
    with pytest.raises(FormatError, match="has 2"):
        bnb.from_bnb(NAME, tensors)


def test_tables_must_be_those_of_the_format() -> None:
    tensors = bnb.to_bnb(NAME, quantized())
    key = f"{NAME}.quant_map"
    assert_equal(bnb.from_bnb(NAME, tensors | {key: tensors[key] + 5e-7}), quantized())
    for table in (tensors[key] + 1e-4, codebook("int4"), torch.full((16,), math.nan)):
        with pytest.raises(FormatError, match="quant_map"):
            bnb.from_bnb(NAME, tensors | {key: table})
    nested = f"{NAME}.nested_quant_map"
    with pytest.raises(FormatError, match="nested_quant_map"):
        bnb.from_bnb(NAME, tensors | {nested: tensors[nested].flip(0)})


def test_scales_must_be_finite() -> None:
    tensors = bnb.to_bnb(NAME, quantized())
    key = f"{NAME}.nested_absmax"
    with pytest.raises(FormatError, match="nested_absmax has values that are not finite"):
        bnb.from_bnb(NAME, tensors | {key: tensors[key] * math.inf})


def test_zero_points_beyond_four_bits_are_refused() -> None:
    tensors = bnb.to_bnb(NAME, quantized(spec=QuantSpec("int4_asym")))
    tensors[f"{NAME}.zero_points"][2] = 16
    with pytest.raises(FormatError, match="zero_points holds 16"):
        bnb.from_bnb(NAME, tensors)


# ---- config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [64, 128])
def test_config_round_trip(block_size: int, double_quant: bool, format: str) -> None:
    spec = QuantSpec(format, block_size, double_quant)
    config = bnb.quantization_config(BaseFormats(spec), torch.bfloat16, ["lm_head"])
    assert bnb.formats_from_config({"quantization_config": json.loads(json.dumps(config))}) == BaseFormats(spec)


def test_config_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = bnb.quantization_config(BaseFormats(), torch.bfloat16, ["lm_head"])
    theirs = transformers.BitsAndBytesConfig.from_dict(config)
    assert theirs.load_in_4bit and theirs.quantization_method() == "nf4" and theirs.bnb_4bit_use_double_quant
    assert theirs.bnb_4bit_compute_dtype == torch.bfloat16 and theirs.llm_int8_skip_modules == ["lm_head"]
    assert bnb.formats_from_config({"quantization_config": theirs.to_dict()}) == BaseFormats()
    assert set(config) <= set(theirs.to_dict())


def test_config_without_quantization() -> None:
    assert bnb.formats_from_config({"model_type": "llama"}) is None


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_8bit": False, "load_in_4bit": False},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "af4"},
        {"quant_method": "nybble", "format": "int4"},
        {"quant_method": "nybble", "format": "int4", "double_quant": True, "block_size": "64"},
        {"quant_method": "nybble", "format": "int4", "double_quant": True, "block_size": 65},
        {},
    ],
    ids=str,
)
def test_configs_we_cannot_read(quantization: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        bnb.formats_from_config({"quantization_config": quantization})
