"""GGUF files: metadata, and tensors one at a time, widened from their blocks.

The header is parsed here, with every size checked before it is used: the reader in the `gguf` package
makes an array object for each string of the vocabulary, which takes seconds and some 100 MB. What the
blocks mean and what the tensors are called is left to that package.

Format: magic | version | counts | key-value pairs | tensor table | padding | tensor data, little-endian.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from torch import Tensor

from nybble.errors import ModelError
from nybble.formats.rotary_rows import restored
from nybble.formats.safetensors import TensorEntry, read_exactly, row_entry

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ARCHITECTURES = (
    "llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "olmoe", "smollm3", "granite", "phi3", "mistral3", "gemma2",
    "gemma3", "gemma4",
)  # fmt: skip
PANEL_ELEMENTS = 1 << 20  # widened at a time
MAX_DIMS = 4
DENSE_ENDS = ("token_embd.weight", "output.weight", "per_layer_token_embd.weight")
LATTICES = ("Q4_0", "Q4_1")  # types whose values are evenly spaced within a block
INTERLEAVED = ("llama", "smollm3", "granite", "mistral3")  # architectures in which rotary pairs lie side by side
WINDOWLESS = {"gemma2": 2, "gemma3": 6}  # every which layer has no window, where a file does not say
LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the model whose scores llama.cpp scales by another width
NORMED_ROUTING = {"qwen2moe": False, "qwen3moe": True, "olmoe": False}  # what llama.cpp takes for granted of each
STILL = 1e30  # what llama.cpp divides a frequency by that turns nothing
EXPERTS = {  # transformers' parameter of all experts -> what GGUF has a tensor for, whose rows follow one another
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}

FREQUENCIES, FACTORS = "rope_freqs.weight", ("rope_factors_short.weight", "rope_factors_long.weight")

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
VERSIONS = (2, 3)


class GgufFile:
    """A GGUF file's metadata and tensors.

    Args:
        path: of the file.

    Attributes:
        metadata: key -> number, bool or string; for an array its length (`array` reads it).
        architecture: as llama.cpp names it. Mistral and SmolLM2 files say "llama".
        entries: tensor name -> where it lies; `dtype` is the block type, such as "Q4_1".

    Raises:
        ModelError: not a GGUF file, truncated, malformed, or of a version, byte order, block type or architecture that
            is not supported.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self._arrays: dict[str, int] = {}  # where each begins
        with self._cursor() as cursor:
            self._parse(cursor)

    @contextmanager
    def _cursor(self) -> Iterator["_Cursor"]:
        try:
            with open(self.path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield _Cursor(data)
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read: {error.strerror}.", fix="Check the path.") from error
        except (ValueError, struct.error) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(
                f"{self.path} is not a complete GGUF file: {error}.", "Allowed: GGUF version 2 or 3.", "Fetch it again."
            ) from error

    def array(self, key: str) -> list[Any]:
        """The array under a key of `metadata`; empty where the file has none."""
        if key not in self._arrays:
            return []
        with self._cursor() as cursor:
            cursor.position = self._arrays[key]
            return cursor.array()

    def number(self, key: str, default: float | None = None) -> float:
        """The number under a key; an array of one number for all layers is that number.

        Args:
            default: where the file does not have the key.

        Raises:
            ModelError: there is none, or layers have different ones.
        """
        values = set(self.array(key)) if key in self._arrays else {self.metadata.get(key, default)}
        value = values.pop() if len(values) == 1 else None
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            what = "a number for each layer" if values else "no number"  # the one that was there is taken
            raise ModelError(
                f"{self.path} has {what} under {key}.",
                "Needed: one number.",
                "Use the model's safetensors folder.",
            )
        return value

    def numbers(self, key: str, layers: int) -> list[Any]:
        """The number of each of so many layers under a key: an array of them, or one number for all.

        Raises:
            ModelError: there is neither.
        """
        found = self.array(key) if key in self._arrays else [self.metadata.get(key)] * layers
        if not layers or len(found) != layers or not all(isinstance(value, int | float) for value in found):
            raise ModelError(
                f"{self.path} has no number for each of its {layers} layers under {key}.",
                "Needed: so many numbers, or one for all.",
                "Use the model's safetensors folder.",
            )
        return found

    def _parse(self, cursor: "_Cursor") -> None:
        if cursor.take(4) != b"GGUF":
            raise ValueError("it does not start with GGUF")
        self._check_version(cursor.scalar("<I"))
        num_tensors, num_pairs = cursor.scalar("<Q"), cursor.scalar("<Q")
        for _ in range(num_pairs):
            key = cursor.string()
            if key in self.metadata:
                raise ValueError(f"it has the key {key!r} twice")
            type_id, position = cursor.scalar("<I"), cursor.position
            if type_id == _ARRAY:
                self._arrays[key] = position
            self.metadata[key] = cursor.value(type_id)
        self.architecture: str = self.metadata.get("general.architecture", "")
        if self.architecture not in ARCHITECTURES:
            raise ModelError(
                f"{self.path} has the architecture {self.architecture!r}.",
                f"Supported in GGUF: {', '.join(ARCHITECTURES)} (Mistral, Mixtral and SmolLM2 files say llama).",
                "Use the model's safetensors folder.",
            )
        if (parts := self.metadata.get("split.count", 1)) not in (0, 1):
            raise ModelError(
                f"{self.path} is one of {parts} parts of a model.",
                "Allowed: a GGUF file that holds a whole model.",
                "Join the parts with llama.cpp's llama-gguf-split --merge.",
            )
        layers = self.metadata.get(f"{self.architecture}.block_count", 0)
        if type(layers) is not int or not 0 <= layers <= num_tensors:
            raise ValueError(f"it speaks of {layers!r} layers and of {num_tensors} tensors")
        table = [cursor.tensor_info() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0:
            raise ValueError(f"its alignment is {alignment!r}")
        data_start = -(-cursor.position // alignment) * alignment
        self.header_sha256 = hashlib.sha256(cursor.data[: cursor.position]).hexdigest()
        self.entries: dict[str, TensorEntry] = {}
        for name, shape, type_id, offset in table:
            if name in self.entries:
                raise ValueError(f"the tensor {name!r} is there twice")
            start = data_start + offset
            dtype, nbytes = self._type_and_bytes(name, shape, type_id)
            if start + nbytes > len(cursor.data):
                raise ValueError(f"it ends at byte {len(cursor.data)}, within the tensor {name!r}")
            self.entries[name] = TensorEntry(name, dtype, shape, self.path, start, start + nbytes)

    def _check_version(self, version: int) -> None:
        if version in VERSIONS:
            return
        if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
            raise ModelError(
                f"{self.path} is big-endian: its byte order is that of another kind of machine.",
                "Allowed: little-endian GGUF files.",
                f"Convert it in place, with the gguf package: gguf-convert-endian {self.path} little",
            )
        raise ModelError(
            f"{self.path} is a GGUF file of version {version}.",
            f"Allowed: version {' or '.join(map(str, VERSIONS))}.",
            "Fetch the model in a newer conversion, or use its safetensors folder.",
        )

    def _type_and_bytes(self, name: str, shape: tuple[int, ...], type_id: int) -> tuple[str, int]:
        """A tensor's block type and its bytes."""
        block_type = next((known for known in gguf.GGMLQuantizationType if known == type_id), None)
        if block_type is None or not _can_widen(block_type):
            unknown = f"the block type {type_id}, which the installed gguf package does not know"
            raise ModelError(
                f"{self.path} stores the tensor {name!r} in {unknown if block_type is None else block_type.name}.",
                f"Readable: {', '.join(known.name for known in gguf.GGMLQuantizationType if _can_widen(known))}.",
                "Use the model in another quantisation, or its safetensors folder.",
            )
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[block_type]
        if shape[-1] % block_size:
            raise ValueError(f"the tensor {name!r} has rows of {shape[-1]}, which {block_type.name} cannot have")
        return block_type.name, math.prod(shape) // block_size * block_bytes

    @cached_property
    def block_types(self) -> dict[str, int]:
        """Elements stored in each type, most frequent first."""
        counts: dict[str, int] = {}
        for entry in self.entries.values():
            counts[entry.dtype] = counts.get(entry.dtype, 0) + math.prod(entry.shape)
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def read(self, name: str, dtype: torch.dtype = torch.float32, part: int | None = None) -> Tensor:
        """One tensor widened to `dtype`, in fresh memory; rows are as llama.cpp orders them.

        Args:
            part: the one of its first dimension, such as an expert, that alone is read.
        """
        entry = self._entry(name, part)
        widened = torch.empty((math.prod(entry.shape[:-1]), entry.shape[-1]), dtype=dtype)
        widen_rows(entry, 0, widened)
        return widened.view(entry.shape)

    def read_packed(self, name: str, part: int | None = None) -> Tensor:
        """The bytes of one tensor's blocks, or of a part's, uint8 (rows, bytes of a row), in fresh memory."""
        entry = self._entry(name, part)
        packed = np.empty((math.prod(entry.shape[:-1]), entry.nbytes // math.prod(entry.shape[:-1])), dtype=np.uint8)
        read_exactly(entry.file, entry.start, packed.reshape(-1).data)
        return torch.from_numpy(packed)

    def _entry(self, name: str, part: int | None) -> TensorEntry:
        return self.entries[name] if part is None else row_entry(self.entries[name], part)

    def interleaved_heads(self, name: str, config: "PretrainedConfig") -> int:
        """Heads of a tensor whose rows llama.cpp interleaves, else 0: of q and k of `INTERLEAVED` architectures."""
        if self.architecture not in INTERLEAVED or not name.startswith("blk."):
            return 0
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        return heads.get(name.split(".")[2], 0)

    def in_hf_order(self, values: Tensor, name: str, config: "PretrainedConfig") -> Tensor:
        """`values`, one for each element of tensor `name` or byte of its blocks, with its rows in transformers' order
        (`restored`).
        """
        heads = self.interleaved_heads(name, config)
        if not heads or len(values) % (2 * heads):  # of other shapes than the config's, which is found out elsewhere
            return values
        return restored(values, heads)

    def lattice_steps(self, name: str, part: int | None = None) -> Tensor | None:
        """The distance between neighbouring values of each element's block, fp32, the tensor's shape, rows as
        llama.cpp orders them; None for a type that is not evenly spaced four bits (`LATTICES`).

        Both types begin a block with its fp16 step; `part` as `read` takes it.
        """
        entry = self._entry(name, part)
        if entry.dtype not in LATTICES:
            return None
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[entry.dtype]]
        packed = np.empty((entry.nbytes // block_bytes, block_bytes), dtype=np.uint8)
        read_exactly(entry.file, entry.start, packed.reshape(-1).data)
        steps = torch.from_numpy(packed[:, :2].copy().view(np.float16).astype(np.float32)).abs()  # (blocks, 1)
        return steps.repeat_interleave(block_size).view(entry.shape)

    def names_of(self, model: "PreTrainedModel") -> dict[str, tuple[str, ...]]:
        """transformers' name -> those of the tensors that it lies in, of every parameter of `model` (on the meta device
        is enough) that the file holds, in the file's order.

        Tables of rotary frequencies have no place in a model, whose config says them.

        Raises:
            ModelError: a tensor of the file has no place in the model, or experts are there by half.
        """
        architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        names = gguf_names(model, architecture)
        placed = {part for parts in names.values() for part in parts}
        placed |= {*(FACTORS if self.architecture == "phi3" else [FREQUENCIES]), *self._without_use()}
        unplaced = [name for name in self.entries if name not in placed]
        if unplaced:
            raise ModelError(
                f"{self.path} holds tensors that {type(model).__name__} has no place for: {', '.join(unplaced[:5])}"
                f"{f' and {len(unplaced) - 5} more' if len(unplaced) > 5 else ''}.",
                "Every tensor of the file must be used.",
                "Use the model's safetensors folder.",
            )
        there = {name: [part for part in parts if part in self.entries] for name, parts in names.items()}
        for name, parts in there.items():
            if parts and len(parts) < len(names[name]):
                raise ModelError(f"{self.path} holds {parts[0]} alone of {name}.", fix="Fetch it again.")
        order = {entry: place for place, entry in enumerate(self.entries)}
        stored = sorted((name for name, parts in there.items() if parts), key=lambda name: order[names[name][0]])
        return {name: names[name] for name in stored}

    def _without_use(self) -> Iterator[str]:
        """Tensors that no program computes with: keys and values of Gemma 4's layers that read those of others."""
        keys = (f"{self.architecture}.{key}" for key in ("block_count", "attention.shared_kv_layers"))
        layers, shared = (int(self.number(key, 0)) for key in keys)
        for layer in range(max(0, layers - shared), layers):
            yield from (f"blk.{layer}.{part}.weight" for part in ("attn_k", "attn_v", "attn_k_norm"))

    def complete_config(self, config: "PretrainedConfig") -> None:
        """Set, in place, what transformers' reader leaves out: head width, RoPE scaling, attention without a window.

        Raises:
            ModelError: the file scales its rotary frequencies in a way that is not known here.
        """
        prefix = self.architecture
        if (head_dim := self.metadata.get(f"{prefix}.attention.key_length")) is not None:
            config.head_dim = head_dim
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if self.metadata.get(f"{prefix}.rope.dimension_count", width) != width:
            raise ModelError(
                f"{self.path} turns {self.metadata[f'{prefix}.rope.dimension_count']} of {width} elements of a head.",
                "Heads of this architecture are turned whole.",
                "Use the model's safetensors folder.",
            )
        if getattr(config, "sliding_window", None):
            config.sliding_window = None  # llama.cpp runs these architectures without one
        scaling = self.metadata.get(f"{prefix}.rope.scaling.type", "none")
        if FREQUENCIES in self.entries:
            config.rope_parameters |= self._llama3_scaling(config.rope_parameters["rope_theta"])
        elif scaling == "yarn":
            original = self.metadata.get(f"{prefix}.rope.scaling.original_context_length")
            config.rope_parameters |= {
                "rope_type": "yarn",
                "factor": self.metadata.get(f"{prefix}.rope.scaling.factor", 1.0),
                "original_max_position_embeddings": original or config.max_position_embeddings,
            }
        else:
            config.rope_parameters |= self.linear_rope("none, linear, yarn, and Llama 3's")

    def linear_rope(self, known: str = "none and linear") -> dict[str, Any]:
        """transformers' parameters for rotary frequencies that all are divided by one number, or by none.

        Args:
            known: ways of scaling, for the message.

        Raises:
            ModelError: the file scales them otherwise.
        """
        scaling = self.metadata.get(f"{self.architecture}.rope.scaling.type", "none")
        if tables := [name for name in (FREQUENCIES, *FACTORS) if name in self.entries]:
            raise self._other_scaling(f"a table ({tables[0]})", known)
        if scaling == "linear":
            factor = self.number(f"{self.architecture}.rope.scaling.factor", 1.0)
            return {"rope_type": "linear", "factor": factor}
        if scaling != "none":
            raise self._other_scaling(repr(scaling), known)
        return {"rope_type": "default"}

    def _other_scaling(self, by: str, known: str) -> ModelError:
        return ModelError(
            f"{self.path} scales its rotary frequencies by {by}.",
            f"Known: {known}.",
            "Use the model's safetensors folder.",
        )

    def _llama3_scaling(self, theta: float) -> dict[str, Any]:
        """Llama 3's scaling, recognised by the frequency divisors that the file stores in its place."""
        divisors = self.read(FREQUENCIES).double()  # (head_dim / 2)
        scaling = {
            "rope_type": "llama3",
            "factor": float(divisors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        expected = llama3_divisors(scaling | {"rope_theta": theta}, len(divisors))
        if not torch.allclose(divisors, expected, rtol=1e-3):
            by = f"a table ({FREQUENCIES}) that is not Llama 3's"
            raise self._other_scaling(by, "none, linear, yarn, and Llama 3's")
        return scaling

    def proportional_rope(self, head_dim: int) -> dict[str, Any]:
        """transformers' parameters for the divisors of rotary frequencies that a Gemma 4 file has.

        Raises:
            ModelError: it has none, others, or scales frequencies beside them.
        """
        scaling = self.metadata.get(f"{self.architecture}.rope.scaling.type", "none")
        if FREQUENCIES in self.entries and scaling == "none" and head_dim > 0:
            divisors = self.read(FREQUENCIES)  # (head_dim / 2)
            turned = int((divisors < STILL).sum())
            # of shares that give so many, the exact one where rounding spares it
            shares = (2 * turned / head_dim, (2 * turned + 1) / head_dim)
            rope: dict[str, Any] = {"rope_type": "proportional"}
            rope["partial_rotary_factor"] = next(share for share in shares if int(share * head_dim // 2) == turned)
            if turned and (factor := float(divisors[0])) != 1.0:
                rope["factor"] = factor
            if torch.equal(divisors, proportional_divisors(rope, head_dim)):
                return rope
        by = f"{scaling!r} and a table ({FREQUENCIES}) that is not Gemma 4's"
        raise self._other_scaling(by, "none, and one number for those that turn beside 1e30 for the others")


def gguf_names(model: "PreTrainedModel", architecture: gguf.MODEL_ARCH) -> dict[str, tuple[str, ...]]:
    """transformers' name -> GGUF's, for every parameter that is stored: one; of experts one for each of `EXPERTS`."""
    table = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    names = {}
    for name in model.state_dict():
        owner, _, leaf = name.rpartition(".")
        if owner.endswith(".experts"):
            modules, leaf = [f"{owner}.{part}" for part in EXPERTS.get(leaf, (leaf,))], "weight"
        elif table.get_name(owner) is None:  # a number of a layer's own
            modules, leaf = [name], "weight"
        else:
            modules = [owner]
        found = [table.get_name(module) for module in modules]
        if all(found):
            names[name] = tuple(f"{each}.{leaf}" for each in found)
    return names


def widen_rows(entry: TensorEntry, first: int, out: Tensor) -> None:
    """Fill `out`, contiguous (rows, columns), with the values of a tensor's rows from `first` on."""
    columns, row_bytes = entry.shape[-1], entry.nbytes // math.prod(entry.shape[:-1])
    block_type = gguf.GGMLQuantizationType[entry.dtype]
    panel_rows = max(1, PANEL_ELEMENTS // columns)
    for panel in out.split(panel_rows):
        packed = np.empty((len(panel), row_bytes), dtype=np.uint8)
        read_exactly(entry.file, entry.start + first * row_bytes, packed.reshape(-1).data)
        panel.copy_(torch.from_numpy(gguf.dequantize(packed, block_type)))
        first += len(panel)


def llama3_divisors(rope: Mapping[str, Any], count: int) -> Tensor:
    """Llama 3's scaling as llama.cpp keeps it: what each of `count` frequencies, head_dim / 2, is divided by, fp64.

    Wavelengths below original / high stay, those above original / low are stretched by the factor, and those between
    are blended (transformers' `_compute_llama3_parameters`); `rope` has transformers' keys.
    """
    frequencies = rope["rope_theta"] ** -(torch.arange(count, dtype=torch.float64) / count)
    low, high, original = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    smooth = ((original * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def proportional_divisors(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """transformers' proportional RoPE as llama.cpp keeps it: what each of head_dim / 2 frequencies is divided by, fp32.

    A share of them turns, slowed down by the factor; the others turn nothing (`_compute_proportional_rope_parameters`).
    Without scaling all turn.
    """
    divisors = torch.full((head_dim // 2,), STILL)
    if rope["rope_type"] == "default":
        return divisors.fill_(1.0)
    divisors[: int(rope.get("partial_rotary_factor", 1.0) * head_dim // 2)] = rope.get("factor", 1.0)
    return divisors


class _Cursor:
    """Reads values one after another; what would run past the end raises ValueError or struct.error."""

    def __init__(self, data: mmap.mmap):
        self.data, self.position = data, 0

    def take(self, count: int) -> bytes:
        self._skip(count)
        return self.data[self.position - count : self.position]

    def _skip(self, count: int) -> None:
        if count > len(self.data) - self.position:
            raise ValueError(f"it ends at byte {len(self.data)}, within its header")
        self.position += count

    def scalar(self, format: str) -> Any:
        (value,) = struct.unpack_from(format, self.data, self.position)
        self.position += struct.calcsize(format)
        return value

    def string(self) -> str:
        return self.take(self.scalar("<Q")).decode("utf-8")

    def value(self, type_id: int) -> Any:
        if type_id in _SCALARS:
            return self.scalar(_SCALARS[type_id])
        if type_id == _STRING:
            return self.string()
        if type_id != _ARRAY:
            raise ValueError(f"it has a metadata value of the unknown type {type_id}")
        element_type, length = self.scalar("<I"), self.scalar("<Q")
        if element_type == _STRING:
            for _ in range(length):
                self._skip(self.scalar("<Q"))
        elif element_type in _SCALARS:
            self._skip(length * struct.calcsize(_SCALARS[element_type]))
        else:
            raise ValueError(f"it has an array of the unknown type {element_type}")
        return length

    def array(self) -> list[Any]:
        """The strings or numbers of the array that begins here."""
        element_type, length = self.scalar("<I"), self.scalar("<Q")
        if element_type == _STRING:
            return [self.string() for _ in range(length)]
        format = f"<{length}{_SCALARS[element_type][1:]}"
        return list(struct.unpack(format, self.take(struct.calcsize(format))))

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape (outermost first; the file has it the other way round), type, offset in the data section."""
        name, num_dims = self.string(), self.scalar("<I")
        if not 0 < num_dims <= MAX_DIMS:
            raise ValueError(f"the tensor {name!r} has {num_dims} dimensions")
        shape = tuple(reversed([self.scalar("<Q") for _ in range(num_dims)]))
        if 0 in shape:
            raise ValueError(f"the tensor {name!r} has the shape {shape}")
        return name, shape, self.scalar("<I"), self.scalar("<Q")


@cache
def _can_widen(block_type: gguf.GGMLQuantizationType) -> bool:
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[block_type][1]), dtype=np.uint8), block_type)
    except NotImplementedError:
        return False
    return True
