"""What a base costs in bytes: its blocks in the formats of their layers, resident or on their way, and what stays in
16 bits. Symbols as in costs.py.
"""

import re

from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.planning.run_shape import DENSE_BYTES, ModelShape, RunShape
from nybble.sources.parts import BlockParts


def block_bytes(
    block: BlockParts, spec: QuantSpec | None, average_bits: float | None = None, dense: int = DENSE_BYTES
) -> int:
    """The linear layers and experts of one block; where layers have several formats, of a mean one.

    Args:
        dense: bytes of a weight that is not in four bits.
    """
    if spec is None:
        return dense * block.linear_elements
    if average_bits is not None:
        return round(block.linear_elements * average_bits / 8)
    return sum(num * spec.bytes(elements) for num, elements in block.few_bit_matrices)


def base_bytes(
    shape: ModelShape, spec: QuantSpec | None, average_bits: float | None = None, dense: int = DENSE_BYTES
) -> int:
    """The linear layers of all blocks."""
    return resident_bytes(shape, spec, average_bits, dense, shape.num_layers)


def resident_bytes(
    shape: ModelShape, spec: QuantSpec | None, average_bits: float | None, dense: int, num_blocks: int
) -> int:
    """The linear layers of so many blocks, where they differ of the largest."""
    sizes = [(block_bytes(block, spec, average_bits, dense), count) for block, count in shape.parts.blocks]
    total = 0
    for size, count in sorted(sizes, reverse=True):
        total += min(count, num_blocks) * size
        num_blocks -= min(count, num_blocks)
    return total


def mean_bits(shape: ModelShape, formats: BaseFormats) -> tuple[float, float]:
    """Bits a weight, scales included, of a base whose layers have several formats: of all, and of the block that has
    most.
    """
    sizes = {name: (1, i * o) for block, _ in shape.parts.blocks for name, i, o in block.linears}
    sizes |= {name: (num, i * o) for block, _ in shape.parts.blocks for name, num, i, o in block.stacks}
    blocks: dict[str, tuple[int, int]] = {}
    for layer in formats.layers:
        block, name = re.fullmatch(r"(?:(.*?\.\d+)\.)?(.*)", layer).groups(default="")  # type: ignore[union-attr]
        num, numel = sizes.get(name, (1, shape.largest_linear))
        total, stored = blocks.get(block, (0, 0))
        blocks[block] = total + num * numel, stored + num * formats.of(layer).bytes(numel)
    totals, stores = zip(*blocks.values(), strict=True)
    return 8 * sum(stores) / sum(totals), max(8 * stored / total for total, stored in blocks.values())


def end_bytes(shape: ModelShape, dense: int = DENSE_BYTES) -> int:
    """Embeddings and head; as wide as what else is not in four bits where they cannot stay in 16."""
    return (DENSE_BYTES if shape.narrow_ends else dense) * shape.parts.end_elements


def dense_bytes(shape: ModelShape, dense: int = DENSE_BYTES) -> int:
    """Embeddings, head, norms, and what else lies around the blocks.

    Args:
        dense: bytes of a weight that is neither in four bits nor in embedding and head.
    """
    return end_bytes(shape, dense) + dense * (shape.parts.vector_elements + shape.parts.around_elements)


def streamed_bytes(run: RunShape) -> int:
    """The blocks of a base that pass through memory; 0 where all of them are resident."""
    if run.resident_blocks is None:
        return 0
    stored = (run.spec, run.average_bits, run.compute_bytes)
    return base_bytes(run.model, *stored) - resident_bytes(run.model, *stored, run.resident_blocks)
