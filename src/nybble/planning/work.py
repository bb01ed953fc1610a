"""What a micro-batch has to compute and to move; symbols as in costs.py."""

from dataclasses import dataclass, replace

from nybble.planning import cuda_costs
from nybble.planning.costs import DENSE_BYTES, base_bytes, streamed_bytes
from nybble.planning.run_shape import RunShape


@dataclass(frozen=True)
class Work:
    """What a micro-batch has to compute and move.

    Args:
        flops: of the matrix products, attention aside.
        attention: of its forward passes, and of its backward.
        weight_bytes: dense weights written by dequantisation, over all passes.
        moved_bytes: read and written by that and by all kernels that compute little; counted on GPUs alone.
        read_bytes: of the streamed base and ends.
        block_passes: how often a block is entered, forward or backward.
    """

    flops: float
    attention: tuple[float, float]
    weight_bytes: int
    moved_bytes: int
    read_bytes: int
    block_passes: int

    def plus(self, times: int, other: "Work") -> "Work":
        """Both, the other so many times."""
        return Work(
            self.flops + times * other.flops,
            (self.attention[0] + times * other.attention[0], self.attention[1] + times * other.attention[1]),
            self.weight_bytes + times * other.weight_bytes,
            self.moved_bytes + times * other.moved_bytes,
            self.read_bytes + times * other.read_bytes,
            self.block_passes + times * other.block_passes,
        )


def forward_work(run: RunShape) -> Work:
    """Products of one micro-batch's pass without a gradient."""
    tokens, targets, layers = run.batches.tokens, run.batches.supervised, run.model.num_layers
    head = 0.0 if run.scored else 2.0 * targets * run.model.vocab_size * run.model.hidden_size
    products = 2.0 * tokens * (run.model.multiplied_elements + run.adapter_parameters - run.idle_parameters) + head
    attention = 2.0 * tokens * run.batches.longest_row * run.model.query_width * layers
    dense = 0 if run.spec is None else run.compute_bytes * run.model.touched_elements(tokens)
    stored = 0 if run.spec is None else int(base_bytes(run.model, run.spec, run.average_bits))
    moved = 0 if run.on_cpu else stored + dense + cuda_costs.moved_bytes(run, 0.0) // 3  # of forward and backward
    return Work(products, (attention, 0.0), dense, moved, streamed_bytes(run), layers)


def work_of(run: RunShape) -> Work:
    """Products of one micro-batch: forward, recomputation, input gradients, adapters, attention, head; and what else
    goes forward beside it.

    Attention is causal and within rows.
    """
    if run.filled_up:
        run = replace(run, batches=run.batches.filled_up())
    tokens, layers = run.batches.tokens, run.model.num_layers
    forward = 2.0 * tokens * run.model.multiplied_elements
    # The share of blocks that compute something again.
    share = 0.0 if run.keep == "everything" else (layers - run.whole_blocks) / max(1, layers)
    spared = run.model.last_products + (run.model.last_expert_products if run.path == "blocks" else 0)
    again = share * (forward - 2.0 * tokens * spared)
    attention = 2.0 * tokens * run.batches.longest_row * run.model.query_width * layers
    attention_passes = 1 + (share if run.keep == "nothing" else 0)
    adapters = 6.0 * tokens * (run.adapter_parameters - run.idle_parameters) * (1 + share / 3)
    weights = forward * (3 if run.full else 2) + again
    head = (6.0 if run.full else 4.0) * run.batches.supervised * run.model.vocab_size * run.model.hidden_size
    head *= 2 if run.trained_head else 1  # logits again in the backward pass, and the weight's gradient
    head = 0.0 if run.scored else head
    # There, recomputation and backward share a weight, as those of experts do.
    passes = 2 + (0 if run.wide or (run.path == "blocks" and run.model.expert_width) else share)
    dense = 0 if run.spec is None else int(run.compute_bytes * run.model.touched_elements(tokens) * passes)
    read = 2 * streamed_bytes(run)
    if run.stream_ends and not run.scored:
        chunks = -(-run.batches.supervised // run.rules.chunk_rows(run.model.vocab_size * run.compute_bytes))
        read += 2 * chunks * DENSE_BYTES * run.model.vocab_size * run.model.hidden_size
    stored = 0 if run.spec is None else int(passes * base_bytes(run.model, run.spec, run.average_bits))
    moved = 0 if run.on_cpu else stored + dense + cuda_costs.moved_bytes(run, share)
    products = weights + adapters + head
    training = Work(products, (attention_passes * attention, 2.5 * attention), dense, moved, read, 2 * layers)
    return training.plus(run.more_forwards, forward_work(run)) if run.more_forwards else training
