"""What of a model goes into four bits and what stays as it is, read off its own parameters."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from nybble.layers.convert import TOWERS, block_names, quantizable_linears
from nybble.layers.dense import input_embedding, is_encoder_decoder
from nybble.layers.lora import linear_features
from nybble.layers.quantized_experts import ExpertShape, expert_shapes
from nybble.sources.parts import BlockParts, Inventory, without_numbers
from nybble.sources.skeleton import dense_end_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def take_inventory(model: "PreTrainedModel", in_four_bits: Collection[str] | None = None) -> Inventory:
    """What this model consists of; it may be on the meta device.

    Args:
        in_four_bits: names of the linear layers and projections of experts that are; all of the blocks' if not given.
    """
    stacks = expert_shapes(model)
    linears = {*quantizable_linears(model), *stacks} if in_four_bits is None else set(in_four_bits)
    ends = dense_end_weights(model)
    blocks = set(block_names(model))
    seen: set[int] = set()
    inside: dict[str, list[tuple[str, nn.Parameter]]] = {}
    by_name = {kind: Counter[str]() for kind in ("linears", "dense", "around")}
    around_elements = end_elements = 0
    for name, parameter in model.named_parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        block = next((block for block in _parents(name) if block in blocks), None)
        if block is not None:
            inside.setdefault(block, []).append((name.removeprefix(f"{block}."), parameter))
        if name in ends:
            end_elements += parameter.numel()
        elif block is None:
            around_elements += parameter.numel()
        linear = name.removesuffix(".weight")
        if (linear != name or name in stacks) and linear in linears:
            by_name["linears"][without_numbers(linear)] += parameter.numel()
        elif parameter.ndim > 1 and name not in ends:
            by_name["around" if block is None else "dense"][without_numbers(name)] += parameter.numel()
    encoding = _encoding_modules(model)
    parts = Counter(
        replace(_parts(own := model.get_submodule(block), block, found, linears, stacks), encodes=id(own) in encoding)
        for block, found in inside.items()
    )
    head = model.get_output_embeddings()
    vocabulary, width = _embedding_shape(model) if head is None else head.weight.shape
    names = {kind: tuple(found.items()) for kind, found in by_name.items()}
    return Inventory(
        tuple(parts.items()),
        **names,
        around_elements=around_elements,
        end_elements=end_elements,
        head=(vocabulary, width),
    )


def _encoding_modules(model: "PreTrainedModel") -> set[int]:
    """Ids of the modules of an encoder-decoder's encoder, and of all around the language model of one that reads
    pictures; none of other models.
    """
    if is_encoder_decoder(model):
        encoder: Any = model.get_encoder()
        return {id(module) for module in encoder.modules()}
    if not hasattr(model.config, TOWERS):
        return set()
    decoder: Any = model.get_decoder()
    return {id(module) for module in model.modules()} - {id(module) for module in decoder.modules()}


def _embedding_shape(model: "PreTrainedModel") -> tuple[int, int]:
    """Of a vision model, which has no vocabulary, the filters of its patches: 0, and as wide as its states."""
    weight = next(input_embedding(model).parameters())
    return (0, weight.shape[0]) if weight.ndim > 2 else (weight.shape[0], weight.shape[1])


def _parents(name: str) -> list[str]:
    """`a.b.c` -> a, a.b"""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _parts(
    block: nn.Module,
    block_name: str,
    parameters: list[tuple[str, nn.Parameter]],
    in_four_bits: Collection[str],
    stacks: Mapping[str, ExpertShape],
) -> BlockParts:
    linears, experts, matrices, vectors = [], [], [], 0
    for name, parameter in parameters:
        stack = stacks.get(f"{block_name}.{name}")
        if stack is not None and f"{block_name}.{name}" in in_four_bits:
            experts.append((name, stack.num, stack.in_features, stack.out_features))
            continue
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and f"{block_name}.{owner}".rstrip(".") in in_four_bits:
            linears.append((owner, *linear_features(block.get_submodule(owner))))
        elif parameter.ndim > 1:
            matrices.append((name, tuple(parameter.shape)))
        else:
            vectors += parameter.numel()
    said = [getattr(module, "top_k", None) for module in block.modules()]
    active = max((count for count in said if isinstance(count, int)), default=None)
    return BlockParts(tuple(linears), tuple(experts), tuple(matrices), vectors, active)
