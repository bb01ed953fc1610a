"""GGUF files for llama.cpp and Ollama: whole models and LoRA adapters, one tensor at a time.

Names of tensors, metadata keys and block types are the `gguf` package's. llama.cpp turns neighbouring elements of
q and k together in some architectures where transformers turns the halves of a head (`Family.gguf_neighbours`); the
rows of q and k are therefore interleaved there, in the adapter's B as in the weight. Others keep the order.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from nybble.data.template import ChatTemplate
from nybble.errors import ExportError
from nybble.events import Listener, Note, silent, tracked
from nybble.exporting.gguf_keys import add_hyperparameters, architecture_of, check_family, left_out, rope_tensors
from nybble.exporting.gguf_vocabulary import add_vocabulary
from nybble.families import FAMILIES
from nybble.files.disk import fsync
from nybble.formats.gguf import DENSE_ENDS, gguf_names
from nybble.layers.convert import end_modules
from nybble.layers.lora import linear_features
from nybble.options.use_groups import GgufType
from nybble.runs.adapter_files import StoredAdapter
from nybble.sources.stored_model import StoredModel

MODEL_FILE, ADAPTER_FILE = "model.gguf", "adapter.gguf"


@dataclass(frozen=True)
class _Planned:
    """A tensor of the file: where it comes from and how it is stored."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    read: Callable[[], Tensor]


def write_gguf_model(
    merged: StoredModel, kind: GgufType, template: ChatTemplate, file: Path, report: Listener = silent
) -> None:
    """Write a merged model to `file` (inside a staging folder: by itself it leaves a partial file when interrupted).

    Args:
        kind: of the matrices. Vectors stay in fp32; matrices whose rows a block type cannot have, in fp16.

    Raises:
        ExportError: a family or tokenizer that llama.cpp has no counterpart for.
    """
    config = merged.config
    check_family(config)
    if (loss := left_out(config)) is not None:
        report(Note(loss))
    names, offset = _names(merged), FAMILIES[config.model_type].norm_offset
    shapes = {target: place.shape for target, place in merged.placements.items()}
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture_of(config)])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_hyperparameters(writer, config)
    add_vocabulary(writer, template, merged.skeleton.get_input_embeddings().num_embeddings)

    def read(name: str) -> Tensor:
        tensor = merged.read_parameter(name)
        assert isinstance(tensor, Tensor), name
        values = _reorder(tensor, name, config)
        return values.float() + offset if offset and name.endswith("norm.weight") else values

    planned = [
        _Planned(names[name], shape, _storage(kind, names[name], shape), partial(read, name))
        for name, shape in shapes.items()
    ]
    for name, factors in rope_tensors(config).items():
        kept = gguf.GGMLQuantizationType.F32
        planned.append(_Planned(name, tuple(factors.shape), kept, partial(factors.clone)))
    _write(writer, planned, report)
    fsync(file)


def write_gguf_adapter(adapter: StoredAdapter, base: StoredModel, file: Path) -> None:
    """Write a LoRA adapter for llama.cpp (`--lora`), in fp32. llama.cpp scales by alpha / rank, with each layer's own
    rank and one alpha: rsLoRA's factor is in alpha, and where layers differ what else there is in B.

    Raises:
        ExportError: the family is none of those that GGUF export knows.
    """
    config, skeleton = base.config, base.skeleton
    check_family(config)
    names = _names(base)
    if ends := set(adapter.names) & set(end_modules(skeleton)):
        raise ExportError(
            f"The adapter changes {sorted(ends)[0]}.",
            "Allowed in llama.cpp's adapters: linear layers of the blocks.",
            "Merge it (`nybble merge`, or export --to gguf).",
        )
    if why := _no_lora(adapter):
        raise ExportError(
            f"The adapter {why}.",
            "Allowed in llama.cpp's adapters: LoRA.",
            "Merge it (`nybble merge`, or export --to gguf).",
        )
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture_of(config)])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    alphas = {layer: adapter.scaling_of(layer) * adapter.rank_of(layer) for layer in adapter.names}
    alpha = next(iter(alphas.values()))
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)

    def read(layer: str, part: int) -> Tensor:
        matrix = adapter.matrices(layer, *linear_features(skeleton.get_submodule(layer)))[part]
        return _reorder(matrix * (alphas[layer] / alpha), f"{layer}.weight", config) if part else matrix

    planned = []
    for layer in adapter.names:
        in_features, out_features = linear_features(skeleton.get_submodule(layer))
        name, full, rank = names[f"{layer}.weight"], gguf.GGMLQuantizationType.F32, adapter.rank_of(layer)
        planned.append(_Planned(f"{name}.lora_a", (rank, in_features), full, partial(read, layer, 0)))
        planned.append(_Planned(f"{name}.lora_b", (out_features, rank), full, partial(read, layer, 1)))
    _write(writer, planned, silent)
    fsync(file)


def _no_lora(adapter: StoredAdapter) -> str:
    """What it has beside LoRA's matrices; "" where nothing."""
    if adapter.modules:
        return f"has {next(iter(adapter.modules))} trained whole"
    return "is DoRA's" if adapter.dora else "has trained rows of tokens" if adapter.tokens else ""


def read_gguf_adapter(file: Path, base: StoredModel) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
    """A GGUF adapter for this base: its alpha, and layer -> (A, B) in transformers' order."""
    reader = gguf.GGUFReader(file)
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    layers = {stored: name.removesuffix(".weight") for name, stored in _names(base).items()}
    matrices: dict[str, dict[str, Tensor]] = {}
    for tensor in reader.tensors:
        stored, _, part = tensor.name.rpartition(".")
        matrix = torch.from_numpy(np.array(tensor.data))
        matrices.setdefault(layers[stored], {})[part] = (
            _restore(matrix, f"{layers[stored]}.weight", base.config) if part == "lora_b" else matrix
        )
    return alpha, {layer: (parts["lora_a"], parts["lora_b"]) for layer, parts in matrices.items()}


def gguf_bytes(merged: StoredModel, kind: GgufType) -> int:
    """Bytes that the tensors of a merged model take."""
    names = _names(merged)
    total = 0
    for name, tensor in merged.skeleton.state_dict().items():
        if name in names:
            per_block, block_bytes = gguf.GGML_QUANT_SIZES[_storage(kind, names[name], tuple(tensor.shape))]
            total += tensor.numel() // per_block * block_bytes
    return total


def _write(writer: gguf.GGUFWriter, planned: list[_Planned], report: Listener) -> None:
    try:
        for tensor in planned:
            nbytes = math.prod(tensor.shape) // gguf.GGML_QUANT_SIZES[tensor.type][0]
            nbytes *= gguf.GGML_QUANT_SIZES[tensor.type][1]
            shape, dtype = tensor.shape, _numpy_dtype(tensor.type)
            if dtype == np.uint8:
                shape = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type)
            writer.add_tensor_info(tensor.name, shape, dtype, nbytes, tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tracked(planned, "writing", report):
            values = tensor.read()
            assert tuple(values.shape) == tensor.shape, (tensor.name, values.shape)
            writer.write_tensor_data(gguf.quantize(values.float().contiguous().numpy(), tensor.type))
    finally:
        writer.close()


def _numpy_dtype(stored: gguf.GGMLQuantizationType) -> np.dtype[Any]:
    """What `gguf.quantize` gives: bytes, for all but the types that numpy has."""
    known: dict[str, type] = {"F32": np.float32, "F16": np.float16}
    return np.dtype(known.get(stored.name, np.uint8))


def _storage(kind: GgufType, name: str, shape: tuple[int, ...]) -> gguf.GGMLQuantizationType:
    types = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return types.F32
    # llama-quantize, too, puts the ends into q8_0 where the rest is in four bits.
    wanted = types[(GgufType.Q8_0 if kind.in_four_bits and name in DENSE_ENDS else kind).name]
    return types.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def _names(model: StoredModel) -> dict[str, str]:
    """transformers' name -> GGUF's, for every parameter that is stored."""
    return gguf_names(model.skeleton, architecture_of(model.config))


def _reorder(tensor: Tensor, target: str, config: PretrainedConfig) -> Tensor:
    """Rows of q and k as llama.cpp's rotation wants them: element i of a head's first half beside that of its second.

    (heads · 2 · half, ...) -> (heads · half · 2, ...)
    """
    heads = _rotated_heads(target, config)
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if heads else tensor


def _restore(tensor: Tensor, target: str, config: PretrainedConfig) -> Tensor:
    """The inverse of `_reorder`."""
    heads = _rotated_heads(target, config)
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2) if heads else tensor


def _rotated_heads(target: str, config: PretrainedConfig) -> int:
    """Heads of a parameter whose rows are reordered, else 0."""
    module = target.rpartition(".")[0]
    if not FAMILIES[config.model_type].gguf_neighbours or not module.endswith(("q_proj", "k_proj")):
        return 0
    heads: int = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
    return heads
