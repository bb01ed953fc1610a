"""GGUF files for llama.cpp and Ollama: whole models and LoRA adapters, one tensor at a time.

Names of tensors, metadata keys and block types are the `gguf` package's. llama.cpp turns neighbouring elements of
q and k together in some architectures where transformers turns the halves of a head (`Family.gguf_neighbours`); the
rows of q and k are therefore interleaved there, in the adapter's B as in the weight. Others keep the order.

Experts are three tensors of three dimensions, gate and up apart, and are read and written one by one. Their adapters
are an A and a B of three dimensions for each; gate and up then have the same A. Routers stay in fp32.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from nybble.data.template import ChatTemplate
from nybble.errors import ExportError
from nybble.events import Listener, Note, silent, tracked
from nybble.exporting.gguf_keys import (
    add_hyperparameters,
    architecture_of,
    check_family,
    left_out,
    rope_tensors,
)
from nybble.exporting.gguf_vocabulary import add_vocabulary
from nybble.families import FAMILIES
from nybble.files.disk import fsync
from nybble.formats.gguf import DENSE_ENDS, PANEL_ELEMENTS, gguf_names
from nybble.formats.rotary_rows import interleaved, restored
from nybble.layers.convert import end_modules
from nybble.layers.lora import linear_features
from nybble.options.use_groups import GgufType
from nybble.runs.adapter_files import StoredAdapter
from nybble.sources.stored_model import StoredModel

MODEL_FILE, ADAPTER_FILE = "model.gguf", "adapter.gguf"
ROUTER, ROW_ALONE = ".ffn_gate_inp.weight", ".ffn_gate_inp_shexp.weight"
IN_16_BITS = "per_layer_model_proj.weight"  # llama-quantize, too, leaves it so


@dataclass(frozen=True)
class _Planned:
    """A tensor of the file: how it is stored, and where it comes from, one part after another.

    It is what `GGUFWriter.write_tensor_data` asks of an array, so that no stack of experts is ever in memory.
    """

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    read: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // per_block * block_bytes

    def tofile(self, file: BinaryIO) -> None:
        written = 0
        for part in self.read():
            written += part.numel()
            gguf.quantize(part.float().contiguous().numpy(), self.type).tofile(file)
        assert written == math.prod(self.shape), (self.name, written, self.shape)


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
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture_of(config)])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_hyperparameters(writer, config)
    add_vocabulary(writer, template, merged.skeleton.get_input_embeddings().num_embeddings)

    def read(name: str) -> Iterable[Tensor]:
        tensor = merged.read_parameter(name)
        assert isinstance(tensor, Tensor), name
        values = _reorder(tensor, name, config)
        if offset and name.endswith("norm.weight"):
            values = values.float() + offset
        # widened and put into blocks a panel of rows at a time, since a vocabulary's matrix is large
        yield from values.split(max(1, PANEL_ELEMENTS // math.prod(values.shape[1:])))

    def read_experts(name: str, rows: slice) -> Iterable[Tensor]:
        for index in range(merged.experts[name].num):
            matrix = merged.read_expert(name, index)
            assert isinstance(matrix, Tensor), name
            yield matrix[rows]

    planned = []
    for name, place in merged.placements.items():
        parts = names[name]
        for part, shape, rows in _split(parts, _shape(parts, place.shape)):
            read_it = partial(read_experts, name, rows) if name in merged.experts else partial(read, name)
            planned.append(_Planned(part, shape, _storage(kind, part, shape), read_it))
    for name, factors in rope_tensors(config).items():
        kept = gguf.GGMLQuantizationType.F32
        planned.append(_Planned(name, tuple(factors.shape), kept, partial(iter, [factors])))
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

    def read(layer: str, part: int) -> Iterable[Tensor]:
        matrix = adapter.matrices(layer, *linear_features(skeleton.get_submodule(layer)))[part]
        yield _reorder(matrix * (alphas[layer] / alpha), f"{layer}.weight", config) if part else matrix

    def read_experts(name: str, part: int, rows: slice) -> Iterable[Tensor]:
        shape = base.experts[name]
        matrices = adapter.expert_matrices(name, shape.num, shape.in_features, shape.out_features)[part]
        yield matrices[:, rows] * (alphas[name] / alpha) if part else matrices

    planned, full = [], gguf.GGMLQuantizationType.F32
    for layer in adapter.names:
        rank = adapter.rank_of(layer)
        if layer in base.experts:
            shape, parts = base.experts[layer], names[layer]
            for part, (num, out, width), rows in _split(parts, (shape.num, shape.out_features, shape.in_features)):
                a, b = partial(read_experts, layer, 0, rows), partial(read_experts, layer, 1, rows)
                planned.append(_Planned(f"{part}.lora_a", (num, rank, width), full, a))
                planned.append(_Planned(f"{part}.lora_b", (num, out, rank), full, b))
            continue
        in_features, out_features = linear_features(skeleton.get_submodule(layer))
        (name,) = names[f"{layer}.weight"]
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
    """A GGUF adapter for this base: its alpha, and layer -> (A, B) in transformers' order, of experts all of them."""
    reader = gguf.GGUFReader(file)
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    stored = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    matrices = {}
    for name, parts in _names(base).items():
        if f"{parts[0]}.lora_a" not in stored:
            continue
        first = stored[f"{parts[0]}.lora_a"]
        assert all(torch.equal(stored[f"{part}.lora_a"], first) for part in parts), name
        b = torch.cat([stored[f"{part}.lora_b"] for part in parts], dim=-2)
        matrices[name.removesuffix(".weight")] = (first, _restore(b, name, base.config))
    return alpha, matrices


def gguf_bytes(merged: StoredModel, kind: GgufType) -> int:
    """Bytes that the tensors of a merged model take."""
    names = _names(merged)
    total = 0
    for name, tensor in merged.skeleton.state_dict().items():
        parts = names.get(name, ())
        for part, shape, _ in _split(parts, _shape(parts, tuple(tensor.shape))) if parts else ():
            per_block, block_bytes = gguf.GGML_QUANT_SIZES[_storage(kind, part, shape)]
            total += math.prod(shape) // per_block * block_bytes
    return total


def _split(parts: tuple[str, ...], shape: tuple[int, ...]) -> Iterable[tuple[str, tuple[int, ...], slice]]:
    """The tensors that a parameter becomes: name, shape and which rows of each of its matrices."""
    if len(parts) == 1:
        yield parts[0], shape, slice(None)
        return
    num, rows, columns = shape[0], shape[1] // len(parts), shape[2]
    for place, part in enumerate(parts):
        yield part, (num, rows, columns), slice(place * rows, (place + 1) * rows)


def _shape(parts: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the tensor for a parameter: the shared expert's gate is the one row of its matrix."""
    return shape[1:] if parts[0].endswith(ROW_ALONE) else shape


def _write(writer: gguf.GGUFWriter, planned: list[_Planned], report: Listener) -> None:
    try:
        for tensor in planned:
            shape, dtype = tensor.shape, _numpy_dtype(tensor.type)
            if dtype == np.uint8:
                shape = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type)
            writer.add_tensor_info(tensor.name, shape, dtype, tensor.nbytes, tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tracked(planned, "writing", report):
            writer.write_tensor_data(cast(Any, tensor))
    finally:
        writer.close()


def _numpy_dtype(stored: gguf.GGMLQuantizationType) -> np.dtype[Any]:
    """What `gguf.quantize` gives: bytes, for all but the types that numpy has."""
    known: dict[str, type] = {"F32": np.float32, "F16": np.float16}
    return np.dtype(known.get(stored.name, np.uint8))


def _storage(kind: GgufType, name: str, shape: tuple[int, ...]) -> gguf.GGMLQuantizationType:
    types = gguf.GGMLQuantizationType
    if len(shape) == 1 or name.endswith(ROUTER):
        return types.F32
    # llama-quantize, too, puts the ends into q8_0 where the rest is in four bits.
    wanted = types[(GgufType.Q8_0 if kind.in_four_bits and name in DENSE_ENDS else kind).name]
    if name == IN_16_BITS and wanted is not types.BF16:
        return types.F16
    return types.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def _names(model: StoredModel) -> dict[str, tuple[str, ...]]:
    """transformers' name -> GGUF's, for every parameter that is stored."""
    return gguf_names(model.skeleton, architecture_of(model.config))


def _reorder(tensor: Tensor, target: str, config: PretrainedConfig) -> Tensor:
    """Rows of q and k as llama.cpp's rotation wants them."""
    heads = _rotated_heads(target, config)
    return interleaved(tensor, heads) if heads else tensor


def _restore(tensor: Tensor, target: str, config: PretrainedConfig) -> Tensor:
    """The inverse of `_reorder`."""
    heads = _rotated_heads(target, config)
    return restored(tensor, heads) if heads else tensor


def _rotated_heads(target: str, config: PretrainedConfig) -> int:
    """Heads of a parameter whose rows are reordered, else 0."""
    module = target.rpartition(".")[0]
    if not FAMILIES[config.model_type].gguf_neighbours or not module.endswith(("q_proj", "k_proj")):
        return 0
    heads: int = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
    return heads
