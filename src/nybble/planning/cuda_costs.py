"""What a run on a GPU costs beside what its tensors say: arithmetic on what PyTorch's sources and FlashAttention-2's
say they take, in bytes of memory and in bytes moved. None of it was measured.

Symbols as in costs.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nybble.planning.run_shape import RunShape

ROUND_BYTES = 512  # the caching allocator's smallest step
SMALL_BYTES, SMALL_SEGMENT = 2**20, 2**21  # tensors up to the first share segments of the second,
LARGE_BYTES, LARGE_SEGMENT = 10 * 2**20, 20 * 2**20  # and those below the first these; larger ones have their own
WORKSPACE_BYTES = 2 * 2**25  # cuBLAS's for each of two threads, forward and backward: 32 MiB on Hopper, 8 on others
FLASH_ROWS = 128  # by which FlashAttention-2 pads each document
FLASH_COLUMNS = 32  # it pads heads to a multiple of
SUM_BYTES = 4  # fp32
ROW_BYTES = 7 * 8  # of a token: ids and positions, as they come and filled up; targets, and where they are
ANGLE_BYTES = 2 * 4  # of a head's element: cosines and sines in fp32, half of either, for two kinds of layers
HEAD_BYTES = 24  # of a state at the head: six in fp32 in the backward pass of a last norm of transformers'
GENERIC_PASSES = 4  # what is kept is written and read, recomputed, and its gradient is written and read; a guess
KEPT_TENSORS = {"nothing": 1, "attention": 2, "everything": 5}  # large ones: input, x2, q/k/v, attention, gate and up


def reserved_bytes(num_bytes: int) -> int:
    """What a tensor takes of the memory that PyTorch reserves: its share of a segment that holds only such."""
    size = -(-num_bytes // ROUND_BYTES) * ROUND_BYTES
    if size >= LARGE_BYTES:
        return -(-size // SMALL_SEGMENT) * SMALL_SEGMENT
    segment = SMALL_SEGMENT if size <= SMALL_BYTES else LARGE_SEGMENT
    return segment // (segment // max(1, size))


def allocator_bytes(run: RunShape) -> int:
    """Reserved beside what is allocated: for the base as if all of it were resident, where it is streamed one tensor a
    block, and a segment of each kind that is not full.
    """
    beside = SMALL_SEGMENT + LARGE_SEGMENT
    for block, count in run.model.parts.blocks:
        sizes = [size for _, rows, columns in block.linears for size in _weight_tensors(run, rows * columns)]
        if run.resident_blocks is not None:
            sizes = [sum(sizes)]
        beside += count * sum(reserved_bytes(size) - size for size in sizes)
    return beside


def _weight_tensors(run: RunShape, numel: int) -> tuple[int, ...]:
    """Bytes of the tensors that a weight is kept in: packed, and its scales."""
    if run.spec is None:
        return (run.compute_bytes * numel,)
    packed = run.spec.packed_bytes(numel)
    return packed, run.spec.bytes(numel) - packed


def kept_rounding_bytes(run: RunShape, kept: int) -> int:
    """Reserved beside the `kept` bytes of a block, as if its tensors were all of one size."""
    tensors = KEPT_TENSORS[run.keep]
    return tensors * reserved_bytes(kept // tensors) - kept


def flash_scratch(run: RunShape) -> int:
    """What attention's backward pass takes while it runs: dq and the rows' sums in fp32, padded; dq, dk and dv, which
    are copied to where they belong; and dk and dv for each head of queries where keys have fewer.
    """
    _, q, kv, _ = run.model.widths
    tokens, c, heads = run.batches.tokens, run.compute_bytes, run.model.num_heads
    documents = max(1, tokens // max(1, run.batches.longest_row))
    rows = tokens + FLASH_ROWS * documents
    padded = heads * -(-q // heads // FLASH_COLUMNS) * FLASH_COLUMNS
    sums = SUM_BYTES * rows * (padded + heads)
    grads = tokens * c * (q + 2 * kv)
    expanded = 2 * tokens * c * q if kv < q else 0
    return sums + grads + expanded


def graph_bytes(heights: Sequence[Mapping[Any, int]]) -> int:
    """What graphs compute in: a pool that all share, as large as a micro-batch's highest moment, which nothing else can
    use. Evaluations and the micro-batches before a capture take theirs beside it.
    """
    return max(sum(height.values()) for height in heights)


def batch_bytes(run: RunShape) -> int:
    """What all blocks read of a micro-batch beside its states: ids, positions, targets, the angles of positions."""
    head_dim = run.model.query_width // run.model.num_heads
    return run.batches.tokens * (ROW_BYTES + ANGLE_BYTES * head_dim)


def moved_bytes(run: RunShape, again: float) -> int:
    """Read and written by kernels that do one pass over memory, in a micro-batch, weights that are dequantised aside:
    norms, RoPE, SwiGLU and residuals; adapters; the head's softmax. transformers' modules: what they keep, times
    GENERIC_PASSES.

    Args:
        again: the share of blocks that compute something again.
    """
    c, layers = run.compute_bytes, run.model.num_layers
    h, q, kv, f = run.model.widths
    softmax = 5 * run.batches.supervised * run.model.vocab_size * c
    if run.path == "generic":
        per_token: float = GENERIC_PASSES * (16 * h + c * (4 * h + 5 * q + 2 * kv + 4 * f))
    else:
        small = 6 * h + 2 * (q + kv) + 3 * f
        small_backward = 12 * h + 2 * (q + kv) + 6 * f
        adapters = 2 * h + q + f
        adapters_backward = (q + 2 * kv + h + 2 * f + h) + 2 * (2 * h + q + f)
        per_token = c * ((1 + again) * (small + adapters) + small_backward + adapters_backward)
    return softmax + int(layers * run.batches.tokens * per_token)
