"""What a micro-batch has to compute and to move; symbols as in costs.py."""

from dataclasses import dataclass, replace

from nybble.planning import cuda_costs
from nybble.planning.base_costs import base_bytes, streamed_bytes
from nybble.planning.head_costs import chunk_rows
from nybble.planning.run_shape import DENSE_BYTES, RunShape


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
    targets, layers = run.batches.supervised, run.model.num_layers
    tokens = _tokens_of_weights(run)
    head = 0.0 if run.scored else 2.0 * targets * run.model.vocab_size * run.model.hidden_size
    products = 2.0 * tokens * (run.model.multiplied_elements + run.adapter_parameters - run.idle_parameters) + head
    attention = sum(map(_attention, run.sides))
    dense = 0 if run.spec is None else run.compute_bytes * run.model.touched_elements(run.batches.tokens)
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
    tokens, layers = _tokens_of_weights(run), run.model.num_layers
    forward = 2.0 * tokens * run.model.multiplied_elements
    # The share of blocks that compute something again.
    share = 0.0 if run.keep == "everything" else (layers - run.whole_blocks) / max(1, layers)
    spared = run.model.last_products + (run.model.last_expert_products if run.path == "blocks" else 0)
    again = share * (forward - 2.0 * tokens * spared)
    attention = sum(map(_attention, run.sides))
    attention_passes = 1 + (share if run.keep == "nothing" else 0)
    adapters = 6.0 * tokens * (run.adapter_parameters - run.idle_parameters) * (1 + share / 3)
    weights = forward * (3 if run.full else 2) + again
    head = (6.0 if run.full else 4.0) * run.batches.supervised * run.model.vocab_size * run.model.hidden_size
    head *= 2 if run.trained_head else 1  # logits again in the backward pass, and the weight's gradient
    head = 0.0 if run.scored else head
    # There, recomputation and backward share a weight, as those of experts do.
    passes = 2 + (0 if run.wide or (run.path == "blocks" and run.model.expert_width) else share)
    dense = 0 if run.spec is None else int(run.compute_bytes * run.model.touched_elements(run.batches.tokens) * passes)
    read = 2 * streamed_bytes(run)
    if run.stream_ends and not run.scored:
        chunks = -(-run.batches.supervised // chunk_rows(run))
        read += 2 * chunks * DENSE_BYTES * run.model.vocab_size * run.model.hidden_size
    stored = 0 if run.spec is None else int(passes * base_bytes(run.model, run.spec, run.average_bits))
    moved = 0 if run.on_cpu else stored + dense + cuda_costs.moved_bytes(run, share)
    products = weights + adapters + head
    training = Work(products, (attention_passes * attention, 2.5 * attention), dense, moved, read, 2 * layers)
    return training.plus(run.more_forwards, forward_work(run)) if run.more_forwards else training


def _tokens_of_weights(run: RunShape) -> float:
    """Tokens that a weight of a block is multiplied with, in the mean: of an encoder-decoder prompts pass one half, and
    what the other makes its keys and values of for them; answers the other.
    """
    sides = run.sides
    if len(sides) == 1:
        return run.batches.tokens
    passed = sum(side.batches.tokens * side.model.multiplied_elements for side in sides)
    encoder, decoder = sides
    keys_values = 2 * decoder.model.num_layers * run.model.hidden_size * run.model.key_value_width
    passed += keys_values * (encoder.batches.tokens - decoder.batches.tokens)
    return passed / run.model.multiplied_elements


def _attention(run: RunShape) -> float:
    """Of a pass through a side, within rows and causal; of an encoder twice that, and so is what reads prompts."""
    width, layers = run.model.query_width, run.model.num_layers
    prompts = run.batches.prompts
    attended = run.batches.longest_row
    if prompts is not None:
        attended += 2 * prompts.longest if run.model.crossed else run.batches.longest_row
    return 2.0 * run.batches.tokens * attended * width * layers
