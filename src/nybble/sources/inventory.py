"""What of a model goes into four bits and what stays as it is, read off its own parameters.

Linear layers of the blocks go into four bits. Everything else does not: embeddings and head, norms and biases, and
whatever else a block multiplies by without being a linear layer, such as the stacked experts of a mixture.
"""

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from nybble.errors import ModelError
from nybble.layers.convert import quantizable_linears
from nybble.layers.lora import linear_features
from nybble.options.groups import DENSE_SHARE
from nybble.sources.skeleton import dense_end_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class BlockParts:
    """One block of a model.

    Args:
        linears: (name within the block, in_features, out_features) of what is in four bits.
        matrices: (name within the block, shape) of every other parameter of two dimensions or more.
        vector_elements: of all others: norms, biases.
        active_experts: of stacked experts, those that a token passes; None where none says how many.
    """

    linears: tuple[tuple[str, int, int], ...]
    matrices: tuple[tuple[str, tuple[int, ...]], ...]
    vector_elements: int
    active_experts: int | None

    @property
    def linear_elements(self) -> int:
        return sum(rows * columns for _, rows, columns in self.linears)

    @property
    def matrix_elements(self) -> int:
        return sum(_numel(shape) for _, shape in self.matrices)


@dataclass(frozen=True)
class Inventory:
    """The parameters of a model; one that is used in several places counts once.

    Args:
        blocks: the different blocks there are, and how many of each.
        linears: elements of the linear layers that are in four bits, by name, `*` for each number.
        dense: the same of the other matrices of blocks.
        around: the same of what lies around the blocks, but embedding and head.
        around_elements: of all parameters around the blocks, but embedding and head.
        end_elements: of embedding and head; once where they are tied.
        head: (vocabulary, hidden width).
    """

    blocks: tuple[tuple[BlockParts, int], ...]
    linears: tuple[tuple[str, int], ...]
    dense: tuple[tuple[str, int], ...]
    around: tuple[tuple[str, int], ...]
    around_elements: int
    end_elements: int
    head: tuple[int, int]

    @property
    def num_blocks(self) -> int:
        return sum(count for _, count in self.blocks)

    @property
    def linear_elements(self) -> int:
        """Elements of the blocks' matrices that are put into four bits."""
        return sum(count * block.linear_elements for block, count in self.blocks)

    @property
    def matrix_elements(self) -> int:
        """Elements of the blocks' matrices that stay in 16 bits."""
        return sum(count * block.matrix_elements for block, count in self.blocks)

    @property
    def vector_elements(self) -> int:
        """Elements of norms and biases in blocks."""
        return sum(count * block.vector_elements for block, count in self.blocks)

    @property
    def elements(self) -> int:
        inside = self.linear_elements + self.matrix_elements + self.vector_elements
        return inside + self.around_elements + self.end_elements

    @property
    def dense_share(self) -> float:
        """Share of the weights of all blocks' matrices that stays in 16 bits."""
        total = self.linear_elements + self.matrix_elements
        return self.matrix_elements / total if total else 0.0


def take_inventory(model: "PreTrainedModel", in_four_bits: Collection[str] | None = None) -> Inventory:
    """What this model consists of; it may be on the meta device.

    Args:
        in_four_bits: names of the linear layers that are; all of the blocks' if not given.
    """
    linears = set(quantizable_linears(model) if in_four_bits is None else in_four_bits)
    ends = dense_end_weights(model)
    blocks = _block_names(model)
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
        if linear != name and linear in linears:
            by_name["linears"][without_numbers(linear)] += parameter.numel()
        elif parameter.ndim > 1 and name not in ends:
            by_name["around" if block is None else "dense"][without_numbers(name)] += parameter.numel()
    parts = Counter(_parts(model.get_submodule(block), block, found, linears) for block, found in inside.items())
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    vocabulary, width = (embedding if head is None else head.weight).shape
    names = {kind: tuple(found.items()) for kind, found in by_name.items()}
    return Inventory(
        tuple(parts.items()),
        **names,
        around_elements=around_elements,
        end_elements=end_elements,
        head=(vocabulary, width),
    )


def without_numbers(name: str) -> str:
    """`layers.3.mlp` -> `layers.*.mlp`: what is called alike in every block."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def check_dense_share(inventory: Inventory, name: str, most: float = DENSE_SHARE) -> None:
    """Refuse to call a model four-bit that mostly is not.

    Raises:
        ModelError: more than `most` of its blocks' weights would stay in 16 bits.
    """
    if inventory.dense_share > most:
        raise ModelError(
            f"{name} cannot be put into four bits: {partly_dense(inventory)}.",
            f"Allowed: models of which at most {most:.0%} stays.",
            f"Train in 16 bits with --format none, or accept it with {accepting(inventory)}.",
        )


def partly_dense(inventory: Inventory) -> str:
    """Say how much of the blocks' weights stays in 16 bits, and what that is."""
    names = " and ".join(name for name, _ in sorted(inventory.dense, key=lambda part: -part[1])[:2])
    return f"{inventory.dense_share:.0%} of its blocks' weights stay in 16 bits ({names})"


def accepting(inventory: Inventory) -> str:
    """The option with which a model of this inventory is taken as it is."""
    return f"--max-dense-share {min(1.0, inventory.dense_share + 0.005):.2f}"


def _block_names(model: nn.Module) -> set[str]:
    """Elements of the outermost lists of modules."""
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
    return {f"{name}.{child}" for name in lists for child, _ in model.get_submodule(name).named_children()}


def _parents(name: str) -> list[str]:
    """`a.b.c` -> a, a.b"""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _parts(
    block: nn.Module, block_name: str, parameters: list[tuple[str, nn.Parameter]], in_four_bits: Collection[str]
) -> BlockParts:
    linears, matrices, vectors = [], [], 0
    for name, parameter in parameters:
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and f"{block_name}.{owner}".rstrip(".") in in_four_bits:
            linears.append((owner, *linear_features(block.get_submodule(owner))))
        elif parameter.ndim > 1:
            matrices.append((name, tuple(parameter.shape)))
        else:
            vectors += parameter.numel()
    said = [getattr(module, "top_k", None) for module in block.modules()]
    active = max((count for count in said if isinstance(count, int)), default=None)
    return BlockParts(tuple(linears), tuple(matrices), vectors, active)


def _numel(shape: tuple[int, ...]) -> int:
    elements = 1
    for size in shape:
        elements *= size
    return elements
