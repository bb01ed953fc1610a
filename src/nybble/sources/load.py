"""Stream a source into a model whose block linears are in four bits.

The model is built on the meta device, its block linears are swapped for `QuantizedLinear`, and then
each tensor is read, put into four bits or cast, stored, and dropped. What is in memory at any time is
what was stored so far and one tensor of the source.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from nybble.calibration.search import search_weight
from nybble.events import Listener, silent, tracked
from nybble.formats.quant_spec import BaseFormats
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels.ops import dequantize, quantize
from nybble.layers.convert import quantizable_linears, replace_linears, stream_linears
from nybble.layers.dense import replace_dense_ends
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.layers.rotary import rotate_rows_alone
from nybble.layers.streamed import StreamedEmbedding, StreamedHead
from nybble.sources.folder import FolderSource
from nybble.sources.interface import ModelSource
from nybble.sources.placement import PlacedTensor, place_tensors, read_placed
from nybble.sources.skeleton import build_skeleton, dense_end_weights, is_transposed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(
    source: ModelSource,
    formats: BaseFormats | None,
    compute_dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quality: Literal["absmax", "search"] = "absmax",
    *,
    stream_linears_of: Iterable[str] = (),
    stream_ends: bool = False,
    report: Listener = silent,
) -> "PreTrainedModel":
    """The source as a frozen model in eval mode.

    Linears of the blocks are put into `formats`, where the source has them in 16 or 32 bits; a source that is
    already in four bits keeps its own, bit for bit. Embeddings and head stay in 16 bits (`source.dense_dtype`).
    Everything else is in `compute_dtype`.

    Args:
        formats: of the linears of the blocks; None keeps (or, from a source in four bits, makes) every linear dense,
            in `compute_dtype`.
        compute_dtype: of the products.
        device: where the weights go.
        quality: how scales are chosen for weights that are put into four bits here.
        stream_linears_of: linear layers whose weights are not loaded; a block store has them.
        stream_ends: embedding and head are read where they are used, from a FolderSource.
        report: told which tensor is loaded.

    Raises:
        ModelError: names the tensors that are missing, unknown, of a wrong shape or not finite.
    """
    model = build_skeleton(source.config, compute_dtype)
    fill_computed_buffers(model, device)  # now, while the model's own code finds the modules that it made
    placed = place_tensors(source, model)
    ends = dense_end_weights(model)
    if source.dense_dtype != compute_dtype and not stream_ends:
        ends = replace_dense_ends(model, compute_dtype)
    transposed: set[str] = set()
    if formats is not None:
        linears = _linears_to_quantize(model, source, placed)
        transposed = {f"{name}.weight" for name in linears if is_transposed(model.get_submodule(name))}
        streamed = set(stream_linears_of)
        own = formats if source.quant_spec is None else BaseFormats(source.quant_spec)
        replace_linears(model, [n for n in linears if n not in streamed], own, compute_dtype)
        stream_linears(model, streamed, compute_dtype, device)
        not_loaded = {f"{name}.weight" for name in streamed}
        not_loaded |= {name for name in ends if stream_ends and name.endswith(".weight")}
        placed = [place for place in placed if place.target not in not_loaded]

    for place in tracked(placed, "loading", report):
        dtype = source.dense_dtype if place.target in ends else compute_dtype
        load_one(model, place.target, read_placed(source, place), dtype, device, place.target in transposed, quality)
    model.tie_weights()
    if stream_ends:
        assert isinstance(source, FolderSource), source
        _stream_ends(model, source, compute_dtype, device)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, left
    rotate_rows_alone(model)
    model.generation_config = source.load_generation_config()
    return model.requires_grad_(False).eval()


def _stream_ends(
    model: "PreTrainedModel", source: FolderSource, compute_dtype: torch.dtype, device: torch.device | str
) -> None:
    """Swap embedding and head for ones that read their matrices in the source's files."""
    places = {place.target: place.name for place in place_tensors(source, build_skeleton(source.config))}
    names = {id(module): name for name, module in model.named_modules()}
    embedding = names[id(model.get_input_embeddings())]
    head = names[id(model.get_output_embeddings())]
    matrix = source.matrix(places[f"{embedding}.weight"])
    model.set_submodule(embedding, StreamedEmbedding(matrix, compute_dtype, model.get_submodule(embedding)))
    own = places.get(f"{head}.weight")  # absent where tied
    bias = model.get_submodule(head).bias
    model.set_submodule(head, StreamedHead(matrix if own is None else source.matrix(own), bias, device))


def _linears_to_quantize(model: nn.Module, source: ModelSource, placed: list[PlacedTensor]) -> list[str]:
    """All linears of the blocks; of a source that is already in four bits, those that it has in four bits."""
    names = quantizable_linears(model)
    if source.quant_spec is None:
        return names
    stored = {place.target for place in placed if source.is_quantized(place.name)}
    return [name for name in names if f"{name}.weight" in stored]


@torch.no_grad()
def load_one(
    model: nn.Module,
    target: str,
    tensor: Tensor | QuantizedTensor,
    dtype: torch.dtype,
    device: torch.device | str,
    transposed: bool,
    quality: Literal["absmax", "search"] = "absmax",
) -> None:
    """Put a tensor in its place: four bits where a QuantizedLinear waits for it, else dense in `dtype`."""
    owner, _, leaf = target.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, QuantizedLinear) and leaf == "weight":
        if isinstance(tensor, Tensor):
            matrix = tensor.to(device)
            quantizer = quantize if quality == "absmax" else search_weight
            tensor = quantizer(matrix.T if transposed else matrix, module.spec)
        module.load_quantized(_moved(tensor, device))
        return
    place = getattr(module, leaf)
    if isinstance(tensor, QuantizedTensor):
        tensor = dequantize(_moved(tensor, device), dtype)
        if is_transposed(module):
            tensor = tensor.T.contiguous()
    dense = tensor.to(device=device, dtype=dtype if place.is_floating_point() else place.dtype)
    setattr(module, leaf, nn.Parameter(dense, requires_grad=False) if isinstance(place, nn.Parameter) else dense)


def _moved(q: QuantizedTensor, device: torch.device | str) -> QuantizedTensor:
    return replace(q, packed=q.packed.to(device), scales=q.scales.to(device))


def fill_computed_buffers(model: "PreTrainedModel", device: torch.device | str) -> None:
    """Compute the buffers that checkpoints do not hold, such as rotary frequencies, by the model's own code.

    As `from_pretrained` does it, by initialising the model; whatever else that fills is still on the meta device.
    """
    for name, buffer in model.named_non_persistent_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.empty_like(buffer, device=device))
    model.initialize_weights()
