"""Stream a source into a model whose block linears are in four bits.

The model is built on the meta device, its block linears are swapped for `QuantizedLinear`, and then
each tensor is read, put into four bits or cast, stored, and dropped. What is in memory at any time is
what was stored so far and one tensor of the source.
"""

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from nybble.calibration.search import round_weight
from nybble.errors import ModelError
from nybble.events import Listener, silent, tracked
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.formats.safetensors import MatrixFile
from nybble.layers.convert import replace_linears, stream_linears
from nybble.layers.dense import ends_of, replace_dense_ends
from nybble.layers.full_weights import weights_by_name
from nybble.layers.quantized_experts import QuantizedExperts, replace_experts, stream_experts
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.layers.rotary import rotate_rows_alone
from nybble.layers.streamed import StreamedEmbedding, StreamedHead
from nybble.sources.stored_model import StoredModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(
    source: StoredModel,
    formats: BaseFormats | None,
    compute_dtype: torch.dtype,
    device: torch.device | str = "cpu",
    rounding: Literal["absmax", "search"] = "absmax",
    *,
    stream_linears_of: Iterable[str] = (),
    stream_ends: bool = False,
    narrow_ends: bool = True,
    seed: int = 0,
    report: Listener = silent,
) -> "PreTrainedModel":
    """The source as a frozen model in eval mode.

    Linears and experts of the blocks are put into `formats`, where the source has them in 16 or 32 bits, an expert at a
    time; a source that is already in four bits keeps its own, bit for bit. Embeddings and head stay in 16 bits
    (`source.dense_dtype`). Everything else is in `compute_dtype`, but what the model's makers keep in fp32.

    Args:
        formats: of the linears and experts of the blocks; None keeps (or, from a source in four bits, makes) all of
            them dense, in `compute_dtype`.
        compute_dtype: of the products.
        device: where the weights go.
        rounding: how scales are chosen for weights that are put into four bits here.
        stream_linears_of: linear layers, and projections of experts, whose weights are not loaded; a block store has
            them.
        stream_ends: embedding and head are read where they are used.
        narrow_ends: they stay in 16 bits where the model's own code allows it; else they are in `compute_dtype` too.
        seed: of a head that begins anew.
        report: told which tensor is loaded.

    Raises:
        ModelError: names the tensors that are missing, unknown, of a wrong shape or not finite, or
            an end that cannot be read row by row.
    """
    model = source.empty_model(compute_dtype)
    # Now, while the model's own code finds the modules that it made.
    fill_computed_buffers(model, device, source.computed)
    targets = list(source.placements)
    ends = source.ends if narrow_ends else set()
    if narrow_ends and source.dense_dtype != compute_dtype and not stream_ends:
        ends = replace_dense_ends(model, compute_dtype)
    if formats is not None:
        streamed = set(stream_linears_of)  # below in the model's own order, which parameters then have too
        stored = source.in_four_bits  # of a model that is in four bits already, those that it has in four bits
        own = formats if source.quant_spec is None else BaseFormats(source.quant_spec)

        def here(names: Iterable[str]) -> list[str]:
            return [name for name in names if name not in streamed and (stored is None or name in stored)]

        replace_linears(model, here(source.linears), own, compute_dtype)
        replace_experts(model, here(source.experts), own, compute_dtype)
        stream_experts(model, [name for name in source.experts if name in streamed], device)
        stream_linears(model, streamed - source.experts.keys(), compute_dtype, device)
        not_loaded = {name if name in source.experts else f"{name}.weight" for name in streamed}
        not_loaded |= {name for name in ends if stream_ends and name.endswith(".weight")}
        targets = [target for target in targets if target not in not_loaded]

    for target in tracked(targets, "loading", report):
        if target in source.experts and isinstance(experts := _module(model, target), QuantizedExperts):
            for index in range(experts.num_experts):
                q = _quantized(source.read_expert(target, index), experts.spec, device, rounding)
                experts.load_expert(index, q)
            continue
        layer = target.removesuffix(".weight")
        if layer != target and isinstance(linear := model.get_submodule(layer), QuantizedLinear):
            linear.load_quantized(_quantized(source.read_linear(layer), linear.spec, device, rounding))
            continue
        dtype = source.loaded_dtype(target, compute_dtype, ends)
        load_dense(model, target, source.read_dense(target, dtype, device), dtype, device)
    _begin_head(model, source, device, seed)
    model.tie_weights(recompute_mapping=False)
    if stream_ends:
        _stream_ends(model, source, compute_dtype, device)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, left
    rotate_rows_alone(model)
    model.generation_config = source.load_generation_config()
    return model.requires_grad_(False).eval()


@torch.no_grad()
def refill(model: "PreTrainedModel", source: StoredModel) -> None:
    """Give every weight of a model, none of which is in few bits, the values that a source has for it, in place."""
    places: dict[str, Tensor] = {**dict(model.named_buffers()), **weights_by_name(model)}
    for target in source.placements:
        tensor = source.read_parameter(target)
        assert isinstance(tensor, Tensor), target
        places[target].copy_(tensor)


def _begin_head(model: "PreTrainedModel", source: StoredModel, device: torch.device | str, seed: int) -> None:
    """Draw what is stored for no other task, in fp32, as the model's makers draw it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in source.fresh):
            module = model.get_submodule(owner)
            for leaf, place in list(module.named_parameters(recurse=False)):
                if place.is_meta:
                    setattr(module, leaf, nn.Parameter(torch.zeros(place.shape)))
            model._init_weights(module)
            for leaf, drawn in list(module.named_parameters(recurse=False)):
                load_dense(model, f"{owner}.{leaf}", drawn.detach(), drawn.dtype, device)


def _module(model: nn.Module, name: str) -> Any:
    """What the model has under this name, module or parameter."""
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def _quantized(
    weight: Tensor | QuantizedTensor, spec: QuantSpec, device: torch.device | str, rounding: Literal["absmax", "search"]
) -> QuantizedTensor:
    """A linear's weight, `[out, in]`, on the device; one that is stored in four bits keeps its own."""
    if isinstance(weight, QuantizedTensor):
        return weight.to(device)
    return round_weight(weight.to(device), spec, rounding)


def load_dense(
    model: nn.Module, target: str, tensor: Tensor, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> None:
    """Put a tensor in its place, in `dtype` where it holds fractions."""
    owner, _, leaf = target.rpartition(".")
    module = model.get_submodule(owner)
    place = getattr(module, leaf)
    dense = tensor.to(device=device, dtype=dtype if place.is_floating_point() else place.dtype)
    setattr(module, leaf, nn.Parameter(dense, requires_grad=False) if isinstance(place, nn.Parameter) else dense)


def _stream_ends(
    model: "PreTrainedModel", source: StoredModel, compute_dtype: torch.dtype, device: torch.device | str
) -> None:
    """Swap embedding and head for ones that read their matrices in the source's files."""
    tied = model.all_tied_weights_keys
    for name, end in ends_of(model).items():
        matrix = _end_matrix(source, tied.get(f"{name}.weight", f"{name}.weight"))
        if isinstance(end, nn.Embedding):
            model.set_submodule(name, StreamedEmbedding(matrix, compute_dtype, end))
        else:
            bias: Any = end.bias
            model.set_submodule(name, StreamedHead(matrix, bias, device))


def _end_matrix(source: StoredModel, target: str) -> MatrixFile:
    matrix = source.matrix(source.placements[target].name)
    if matrix is None:
        raise ModelError(
            f"{source.name} does not store {target} as it is used, so that its rows cannot be read one by one.",
            fix="Make a folder of it with `nybble quantize`, and train on that.",
        )
    return matrix


def fill_computed_buffers(model: "PreTrainedModel", device: torch.device | str, computed: Collection[str] = ()) -> None:
    """Compute the buffers that checkpoints do not hold, such as rotary frequencies, by the model's own code.

    As `from_pretrained` does it, by initialising the model; whatever else that fills is still on the meta device.

    Args:
        computed: what else is not stored and computed so.
    """
    for name in computed:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        place: Tensor = getattr(module, leaf)
        empty = torch.empty_like(place, device=device)
        setattr(module, leaf, nn.Parameter(empty, requires_grad=False) if leaf in module._parameters else empty)
    for name, buffer in model.named_non_persistent_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.empty_like(buffer, device=device))
    model.initialize_weights()
