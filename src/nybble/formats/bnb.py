"""bitsandbytes' on-disk keys: a quantised weight as the tensors that its checkpoints hold, and back.

For a weight called `w` (such as `model.layers.0.mlp.up_proj.weight`), of n elements in B blocks:

    w                                    uint8 [ceil(n / 2), 1]
    w.absmax                             fp32 [B], or uint8 [B] with double quantisation
    w.quant_map                          fp32 [16]
    w.nested_absmax                      fp32 [ceil(B / 256)]     with double quantisation
    w.nested_quant_map                   fp32 [256]               with double quantisation
    w.quant_state.bitsandbytes__nf4      uint8: the UTF-8 bytes of a JSON object (or __fp4)

Of formats that bitsandbytes does not have nybble writes `w.quant_state.nybble__int4` (or __int4_asym, __nf3, __nf2)
with the same JSON, with zero points `w.zero_points`, uint8 [B], and for nf3 and nf2 a quant_map of 8 and 4 values and
the bytes of `QuantSpec.packed_bytes`; only nybble reads those. transformers only warns of a quant_method that it does
not know, and then fails on the shapes; so that it refuses such a folder by name, config.json gives OWN_MODEL_TYPE as
its model_type, and the true one beside the format (`refused_by_transformers`, `true_config`).
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from nybble.errors import FormatError
from nybble.formats.codebooks import codebook, dynamic_map
from nybble.formats.format import FORMATS, Format
from nybble.formats.packed_methods import METHODS, packing_from_config
from nybble.formats.quant_spec import NESTED_BLOCK_SIZE, BaseFormats, QuantSpec
from nybble.formats.quantized_tensor import QuantizedTensor, ScaleParts, join_scales

OWN_MODEL_TYPE = "nybble: weights in a format that only nybble loads"
DEFAULT_BLOCK_SIZE = 64  # what a config without a block size means
MIXED = "mixed"  # the format of a folder whose layers have several
MAP_TOLERANCE = 1e-6  # bitsandbytes' own tolerance when it compares maps
MAX_STATE_BYTES = 1 << 16
MAX_DIMS = 8

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ---- writing -------------------------------------------------------------------------------------


def to_bnb(name: str, q: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors to store for a weight; none shares memory with another, so safetensors takes them as they are.

    Args:
        name: of the weight, `.weight` included.
    """
    parts, spec = q.scale_parts(), q.spec
    state: dict[str, Any] = {
        "quant_type": spec.format,
        "blocksize": spec.block_size,
        "dtype": _dtype_name(q.dtype),
        "shape": list(q.shape),
    }
    tensors = {name: q.packed.reshape(-1, 1), f"{name}.quant_map": codebook(spec.format).clone()}
    if spec.double_quant:
        assert parts.codes is not None and parts.absmax2 is not None and parts.offset is not None
        tensors[f"{name}.absmax"] = parts.codes.clone()
        tensors[f"{name}.nested_absmax"] = parts.absmax2.clone()
        tensors[f"{name}.nested_quant_map"] = dynamic_map().clone()
        state |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": parts.offset.item(),
        }
    else:
        assert parts.absmax is not None
        tensors[f"{name}.absmax"] = parts.absmax.clone()
    if parts.zero_points is not None:
        tensors[f"{name}.zero_points"] = parts.zero_points.clone()
    tensors[state_key(name, spec.entry)] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def quantization_config(
    formats: BaseFormats, compute_dtype: torch.dtype, skip_modules: Sequence[str], *, stacks: bool = False
) -> dict[str, Any]:
    """The `quantization_config` of config.json for a folder whose linears are quantised so.

    Where layers differ, it is nybble's own with "mixed" as the format and the format of each layer under "layers".

    bitsandbytes takes the block size from each tensor's state; the config names it only where it is not 64.

    Args:
        compute_dtype: what the weights are multiplied in.
        skip_modules: modules kept in 16 bits, such as `lm_head`.
        stacks: experts are among what is stored (`quantized_stack.py`), which only nybble reads.
    """
    spec, is_mixed = formats.spec, len(formats.names) > 1
    format = MIXED if is_mixed else formats.names[0]
    block_size = {} if spec.block_size == DEFAULT_BLOCK_SIZE else {"block_size": spec.block_size}
    if is_mixed or stacks or not FORMATS[format].bitsandbytes:
        return {
            "quant_method": "nybble",
            "format": format,
            **({"layers": dict(formats.layers)} if is_mixed else {}),
            "double_quant": spec.double_quant,
            "compute_dtype": _dtype_name(compute_dtype),
            "skip_modules": list(skip_modules),
            **block_size,
        }
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": format,
        "bnb_4bit_use_double_quant": spec.double_quant,
        "bnb_4bit_compute_dtype": _dtype_name(compute_dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(skip_modules),
        **block_size,
    }


def refused_by_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json whose weights only nybble reads, such that transformers says so; others as they are."""
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != "nybble":
        return dict(config)
    own = {**quantization, "model_type": config["model_type"]}
    return {**config, "model_type": OWN_MODEL_TYPE, "quantization_config": own}


# ---- reading -------------------------------------------------------------------------------------


def true_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `refused_by_transformers`; without a model_type where that was lost."""
    quantization = config.get("quantization_config")
    if config.get("model_type") != OWN_MODEL_TYPE or not isinstance(quantization, Mapping):
        return dict(config)
    return {**config, "model_type": quantization.get("model_type")}


def formats_from_config(config: Mapping[str, Any]) -> BaseFormats | None:
    """How the linears of a folder are quantised, from the contents of its config.json; None when they are not, or in
    the few bits of another program, which are widened (`packed_methods.py`).

    Of a mixed folder, `spec` is how most are. What each tensor's own state says (`from_bnb`) goes before this.

    Raises:
        FormatError: the folder is quantised in a way nybble cannot read.
    """
    quantization = config.get("quantization_config")
    if quantization is None or packing_from_config(config) is not None:
        return None
    if not isinstance(quantization, Mapping):
        raise FormatError(f"quantization_config is {quantization!r:.200}.", "Needed: an object, or none.")
    method = quantization.get("quant_method")
    if method == "nybble":
        keys = ("format", "double_quant")
    elif method == "bitsandbytes" and quantization.get("load_in_4bit"):
        keys = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    else:
        raise FormatError(
            f"The model is quantised by {method!r}.",
            f"Readable: nybble, {', '.join(METHODS)}, and 16- or 32-bit models.",
            "Start from the 16-bit model.",
        )
    values = [quantization.get(key) for key in keys]
    block_size = quantization.get("block_size", DEFAULT_BLOCK_SIZE)
    if not isinstance(values[0], str) or not isinstance(values[1], bool) or not _is_count(block_size):
        raise FormatError(
            f"quantization_config has {keys[0]}={values[0]!r}, {keys[1]}={values[1]!r}, block_size={block_size!r}.",
            "Needed: a string, a boolean, an integer.",
        )
    if values[0] != MIXED:
        return BaseFormats(QuantSpec(values[0], block_size, values[1]))
    layers = quantization.get("layers")
    if not layers or not isinstance(layers, Mapping) or not all(isinstance(each, str) for each in layers.values()):
        raise FormatError("quantization_config is mixed and names no layers.", "Needed: the format of each.")
    most = max(layers.values(), key=list(layers.values()).count)
    return BaseFormats(QuantSpec(most, block_size, values[1]), layers)


def is_quantized(name: str, tensors: Mapping[str, Any]) -> bool:
    """Whether weight `name` is stored in four bits among these tensors (only the keys are looked at)."""
    return any(state_key(name, format) in tensors for format in FORMATS.values())


def from_bnb(name: str, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    """The weight called `name` (`.weight` included) from a checkpoint's tensors.

    Half-precision scales are cast to fp32, and weights kept in another storage dtype are taken byte by byte.
    Everything is checked before it is used.

    Raises:
        FormatError: names the key that is missing, malformed or of the wrong size.
    """
    key, state = _read_state(name, tensors)
    spec, shape, dtype = _spec(key, state, f"{name}.nested_absmax" in tensors), _shape(key, state), _dtype(key, state)
    numel = math.prod(shape)
    num_blocks = spec.num_blocks(numel)

    _check_map(f"{name}.quant_map", tensors, codebook(spec.format))
    packed = _bytes(name, tensors, spec.packed_bytes(numel))
    zero_points = None
    if spec.entry.zero_points:
        zero_points = _bytes(f"{name}.zero_points", tensors, num_blocks)
        if int(zero_points.max()) > 15:
            raise FormatError(f"{name}.zero_points holds {int(zero_points.max())}.", "Zero points are 0 to 15.")
    if spec.double_quant:
        _check_map(f"{name}.nested_quant_map", tensors, dynamic_map())
        codes = _bytes(f"{name}.absmax", tensors, num_blocks)
        absmax2 = _floats(f"{name}.nested_absmax", tensors, -(-num_blocks // NESTED_BLOCK_SIZE))
        parts = ScaleParts(None, _offset(key, state).to(codes.device), absmax2, codes, zero_points)
    else:
        parts = ScaleParts(absmax=_floats(f"{name}.absmax", tensors, num_blocks), zero_points=zero_points)
    return QuantizedTensor(packed.view(spec.packed_shape(shape)), join_scales(parts), spec, shape, dtype)


@dataclass(frozen=True)
class StoredWeight:
    """Where the bytes of a four-bit weight lie, for reading them straight into the form that is computed with.

    Args:
        pieces: tensor's name -> where it goes, from the start of the packed bytes followed by the scales.
        offset: of double quantisation, the scales' first four bytes; None without it.
        interleaved_heads: whose rows lie as llama.cpp has them (`formats.gguf.interleaved`), to be restored.
    """

    spec: QuantSpec
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: dict[str, int]
    offset: float | None
    interleaved_heads: int = 0

    @property
    def packed_bytes(self) -> int:
        return self.spec.packed_bytes(math.prod(self.shape))

    @property
    def nbytes(self) -> int:
        return self.spec.bytes(math.prod(self.shape))

    def view(self, buffer: Tensor) -> QuantizedTensor:
        """The weight whose bytes `buffer` holds, uint8 `[nbytes]`; nothing is copied."""
        packed = buffer[: self.packed_bytes].view(self.spec.packed_shape(self.shape))
        return QuantizedTensor(packed, buffer[self.packed_bytes :], self.spec, self.shape, self.dtype)


def stored_weight(name: str, num_bytes: Mapping[str, int], read: Callable[[str], Tensor]) -> StoredWeight:
    """The layout of weight `name`; its state and tables are read and checked, its packed bytes and scales are not.

    Args:
        num_bytes: of every stored tensor.
        read: one stored tensor.

    Raises:
        FormatError: a part is missing, or is not stored as the computation takes it (scales in half precision).
    """
    small = [key for key in num_bytes if key.startswith(f"{name}.") and not key.endswith(("absmax", "zero_points"))]
    tensors = {key: read(key) for key in small}
    key, state = _read_state(name, tensors)
    nested = f"{name}.nested_absmax" in num_bytes
    spec, shape = _spec(key, state, nested), _shape(key, state)
    _check_map(f"{name}.quant_map", tensors, codebook(spec.format))
    blocks = spec.num_blocks(math.prod(shape))
    if nested:
        _check_map(f"{name}.nested_quant_map", tensors, dynamic_map())
        scales = {f"{name}.nested_absmax": 4 * -(-blocks // NESTED_BLOCK_SIZE), f"{name}.absmax": blocks}
    else:
        scales = {f"{name}.absmax": 4 * blocks}
    if spec.entry.zero_points:
        scales[f"{name}.zero_points"] = blocks
    pieces, at = {}, 0
    for part, expected in {name: spec.packed_bytes(math.prod(shape)), **scales}.items():
        if num_bytes.get(part) != expected:
            raise FormatError(
                f"{part} has {num_bytes.get(part, 0)} bytes.", f"Its weight's shape needs {expected}, scales in fp32."
            )
        pieces[part] = at
        at += expected + (4 if nested and part == name else 0)  # the offset goes between packed bytes and scales
    offset = _offset(key, state).item() if nested else None
    return StoredWeight(spec, shape, _dtype(key, state), pieces, offset)


def _read_state(name: str, tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """The key and the decoded JSON of a weight's state."""
    known = [state_key(name, format) for format in FORMATS.values()]
    keys = [key for key in known if key in tensors]
    if len(keys) != 1:
        found = "has none" if not keys else f"has {len(keys)}"
        raise FormatError(
            f"A four-bit weight has one quantisation state; {name} {found}.", f"Known: {', '.join(known)}."
        )
    key = keys[0]
    tensor = tensors[key]
    if tensor.dtype != torch.uint8 or not 0 < tensor.numel() <= MAX_STATE_BYTES:
        raise FormatError(f"{key} is {tensor.dtype}, {tensor.numel()} elements.", "It must be JSON as uint8 bytes.")
    try:
        state = json.loads(bytes(tensor.flatten().tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{key} is not JSON: {error}.") from error
    if not isinstance(state, dict):
        raise FormatError(f"{key} holds a {type(state).__name__}.", "It must be a JSON object.")
    return key, state


def _spec(key: str, state: dict[str, Any], nested: bool) -> QuantSpec:
    format, block_size = key.rsplit("__", 1)[1], state.get("blocksize")
    if state.get("quant_type") != format:
        raise FormatError(f"{key} has quant_type {state.get('quant_type')!r}.", f"Its name says {format!r}.")
    if not _is_count(block_size):
        raise FormatError(f"{key} has blocksize {block_size!r}.", "It must be a positive integer.")
    if nested and state.get("nested_blocksize") != NESTED_BLOCK_SIZE:
        raise FormatError(
            f"{key} has nested_blocksize {state.get('nested_blocksize')!r}.", f"Readable: {NESTED_BLOCK_SIZE}."
        )
    try:
        return QuantSpec(format, block_size, nested)
    except FormatError as error:
        raise FormatError(f"{key}: {error.got}", error.allowed) from error


def _shape(key: str, state: dict[str, Any]) -> tuple[int, ...]:
    shape = state.get("shape")
    if not isinstance(shape, list) or not 0 < len(shape) <= MAX_DIMS or not all(_is_count(size) for size in shape):
        raise FormatError(
            f"{key} has shape {shape!r:.200}.", f"It must be a list of 1 to {MAX_DIMS} positive integers."
        )
    return tuple(shape)


def _dtype(key: str, state: dict[str, Any]) -> torch.dtype:
    name = state.get("dtype")
    if not isinstance(name, str) or name not in DTYPES:
        raise FormatError(f"{key} has dtype {name!r}.", f"Known: {', '.join(DTYPES)}.")
    return DTYPES[name]


def _offset(key: str, state: dict[str, Any]) -> Tensor:
    value = state.get("nested_offset")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormatError(f"{key} has nested_offset {value!r}.", "It must be a number.")
    if not abs(value) <= torch.finfo(torch.float32).max:  # so written, it refuses NaN too
        raise FormatError(f"{key} has a nested_offset that is not finite in fp32.")
    return torch.tensor([float(value)], dtype=torch.float32)


def _get(key: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if key not in tensors:
        raise FormatError(f"{key} is missing.", "A four-bit weight needs it.", "The checkpoint may be damaged.")
    return tensors[key]


def _bytes(key: str, tensors: Mapping[str, Tensor], expected: int) -> Tensor:
    tensor = _get(key, tensors)
    got = tensor.numel() * tensor.element_size()
    if got != expected:
        raise FormatError(f"{key} has {got} bytes.", f"Its weight's shape needs {expected}.")
    return tensor.contiguous().view(-1).view(torch.uint8)


def _floats(key: str, tensors: Mapping[str, Tensor], expected: int) -> Tensor:
    tensor = _get(key, tensors)
    if not tensor.is_floating_point() or tensor.numel() != expected:
        raise FormatError(
            f"{key} is {tensor.dtype}, {tensor.numel()} elements.",
            f"Its weight's shape needs {expected} floating-point values.",
        )
    values = tensor.reshape(-1).float()
    if not torch.isfinite(values).all():
        raise FormatError(f"{key} has values that are not finite.", fix="The checkpoint may be damaged.")
    return values


def _check_map(key: str, tensors: Mapping[str, Tensor], ours: Tensor) -> None:
    theirs = _floats(key, tensors, len(ours)).cpu()
    if float((theirs - ours).abs().max()) > MAP_TOLERANCE:
        raise FormatError(
            f"{key} is not the table of its format.", "Weights with tables of their own are not readable."
        )


def state_key(name: str, format: Format) -> str:
    """The key that the state of weight `name` is stored under."""
    owner = "bitsandbytes" if format.bitsandbytes else "nybble"
    return f"{name}.quant_state.{owner}__{format.name}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
