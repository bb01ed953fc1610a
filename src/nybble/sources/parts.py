"""The parts of a model as plain numbers: what of it goes into four bits and what stays as it is.

Linear layers of the blocks go into four bits, and the experts of a mixture. Everything else does not: embeddings and
head, norms and biases, and whatever else a block multiplies by without being a linear layer.
"""

import re
from dataclasses import dataclass
from math import prod

from nybble.errors import ModelError


@dataclass(frozen=True)
class BlockParts:
    """One block of a model.

    Args:
        linears: (name within the block, in_features, out_features) of what is in four bits.
        stacks: (name within the block, experts, in_features, out_features) of projections of experts in four bits.
        matrices: (name within the block, shape) of every other parameter of two dimensions or more.
        vector_elements: of all others: norms, biases.
        active_experts: of stacked experts, those that a token passes; None where none says how many.
        encodes: a block of an encoder-decoder's encoder, or of a vision tower before a language model.
    """

    linears: tuple[tuple[str, int, int], ...]
    stacks: tuple[tuple[str, int, int, int], ...]
    matrices: tuple[tuple[str, tuple[int, ...]], ...]
    vector_elements: int
    active_experts: int | None
    encodes: bool = False

    @property
    def linear_elements(self) -> int:
        """Of what is in four bits."""
        return sum(rows * columns for _, rows, columns in self.linears) + self.stack_elements

    @property
    def stack_elements(self) -> int:
        """Of the experts among it."""
        return sum(num * rows * columns for _, num, rows, columns in self.stacks)

    @property
    def few_bit_matrices(self) -> list[tuple[int, int]]:
        """(matrices, elements of each) in four bits, by layer."""
        return [(1, rows * columns) for _, rows, columns in self.linears] + [
            (num, rows * columns) for _, num, rows, columns in self.stacks
        ]

    @property
    def matrix_elements(self) -> int:
        return sum(prod(shape) for _, shape in self.matrices)

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Last part of a linear's name -> (in_features, out_features)."""
        return {name.rpartition(".")[2]: (rows, columns) for name, rows, columns in self.linears}

    @property
    def experts(self) -> list[tuple[int, ...]]:
        """Shapes of stacks of matrices, one for each expert, in four bits or not."""
        return [(num, rows, columns) for _, num, rows, columns in self.stacks] + self._dense_stacks

    @property
    def _dense_stacks(self) -> list[tuple[int, ...]]:
        return [shape for _, shape in self.matrices if len(shape) == 3 and min(shape[1:]) > 1]

    @property
    def passed_experts(self) -> int:
        """Experts that a token passes; all of them where the model does not say."""
        stacked = max((shape[0] for shape in self.experts), default=0)
        return stacked if self.active_experts is None else min(stacked, self.active_experts)

    @property
    def passed_elements(self) -> int:
        """Elements in four bits that one token is multiplied with."""
        passed = sum(self.passed_experts * rows * columns for _, _, rows, columns in self.stacks)
        return self.linear_elements - self.stack_elements + passed

    def touched_elements(self, tokens: int) -> int:
        """Elements in four bits that so many tokens meet together, at most."""
        met = tokens * self.passed_experts
        touched = sum(min(num, met) * rows * columns for _, num, rows, columns in self.stacks)
        return self.linear_elements - self.stack_elements + touched

    @property
    def multiplied_elements(self) -> int:
        """Elements of the matrices that one token is multiplied with."""
        experts = sum(self.passed_experts * shape[1] * shape[2] for shape in self._dense_stacks)
        dense = sum(shape[0] * shape[1] for _, shape in self.matrices if len(shape) == 2)
        return self.passed_elements + experts + dense


@dataclass(frozen=True)
class Inventory:
    """The parameters of a model; one that is used in several places counts once.

    Args:
        blocks: the different blocks there are, and how many of each.
        linears: elements of the linear layers and experts that are in four bits, by name, `*` for each number.
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
    def stack_elements(self) -> int:
        """Elements of the experts among them."""
        return sum(count * block.stack_elements for block, count in self.blocks)

    @property
    def active_elements(self) -> int:
        """Elements of all parameters that one token meets: of the experts, those that it passes."""
        passed = sum(
            count * block.passed_experts * rows * columns
            for block, count in self.blocks
            for _, rows, columns in block.experts
        )
        stored = sum(
            count * num * rows * columns for block, count in self.blocks for num, rows, columns in block.experts
        )
        return self.elements - stored + passed

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


def without_numbers(name: str) -> str:
    """`layers.3.mlp` -> `layers.*.mlp`: what is called alike in every block."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def check_dense_share(inventory: Inventory, name: str, most: float) -> None:
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
