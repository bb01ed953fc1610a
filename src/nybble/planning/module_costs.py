"""What a block of transformers' modules holds for its backward pass, in bytes: counted module by module where that is
known (of an encoder-decoder's encoder over prompts and its decoder over answers, whose second attention reads the
encoder's states; of a vision tower over patches), else by a rule for all. Symbols as in costs.py.
"""

from nybble.planning.run_shape import MASTER_BYTES, RunShape

FP32 = 4  # bytes: attention whose matrix is dropped in part computes in it, and so do norms that are no `nn.LayerNorm`


def is_counted(run: RunShape) -> bool:
    """Whether the blocks of a side are known so."""
    return run.model.inner_values > 0


def held_bytes(run: RunShape) -> int:
    """All that one block of a side holds: what norms and products read, heads, the attention matrix before and after
    parts of it are dropped, and the factors that drop them, what the activation makes.
    """
    c, model, tokens = run.compute_bytes, run.model, run.batches.tokens
    h, q, kv, f = model.widths
    heads = FP32 if model.dropped_attention else c
    linears = max(len(block.linears) for block, _ in model.parts.blocks)
    states = c * (6 * h + q + model.inner_values * f + linears * run.rank) + heads * (q + 2 * kv)
    held = tokens * (states + 2 * _norm_bytes(run) + matrix_bytes(run, run.batches.longest_row))
    return held + (_crossed_bytes(run, heads) if model.crossed else 0)


def _crossed_bytes(run: RunShape, heads: int) -> int:
    """The second attention with its norm: queries of answers, keys and values of prompts."""
    prompts = run.batches.prompts
    assert prompts is not None
    c, (h, q, kv, _) = run.compute_bytes, run.model.widths
    of_answers = c * (3 * h + q) + heads * q + _norm_bytes(run) + matrix_bytes(run, prompts.longest)
    return run.batches.tokens * of_answers + prompts.tokens * (2 * heads * kv + 2 * c * run.rank)


def _norm_bytes(run: RunShape) -> int:
    """What a norm keeps of a token beside what it read."""
    return FP32 * run.model.hidden_size if run.model.widened_norms and run.compute_bytes < FP32 else 0


def matrix_bytes(run: RunShape, attended: int) -> int:
    """A token's rows of the attention matrices over so many tokens; where nothing is dropped, of the mask, and a number
    a head.
    """
    heads = FP32 * run.model.num_heads
    return 3 * heads * attended if run.model.dropped_attention else heads + run.compute_bytes * attended


def handed_on_bytes(run: RunShape) -> int:
    """The encoder's states, which each block of the decoder reads, and their gradient; 0 of other models."""
    prompts = run.batches.prompts
    tokens = 0 if prompts is None else max(prompts.tokens, prompts.validation_tokens)
    return 2 * tokens * run.compute_bytes * run.model.hidden_size


def weights_read_bytes(run: RunShape) -> int:
    """Of a block whose weights are trained: the gradient of the largest, before it is added, and where products run in
    16 bits all of them rounded.
    """
    return MASTER_BYTES * run.model.largest_linear + rounded_bytes(run)


def rounded_bytes(run: RunShape) -> int:
    """Trained weights of a block as 16-bit products read them; 0 where they read the fp32 masters."""
    if run.compute_bytes == MASTER_BYTES:
        return 0
    return run.compute_bytes * max(block.linear_elements + block.matrix_elements for block, _ in run.model.parts.blocks)


def modules_bytes(run: RunShape) -> int:
    """What transformers' modules of one block hold for their backward pass."""
    if not is_counted(run):
        return run.batches.tokens * module_bytes(run)
    return held_bytes(run) + run.batches.tokens * _adapter_bytes(run)


def module_bytes(run: RunShape) -> int:
    """What transformers' modules of one block hold for their backward pass, per token: fp32 copies inside the two norms
    (input and normalised), then in the compute dtype the inputs of every product and of every elementwise function;
    with dropout each adapter's input once more, and its mask; with DoRA each adapted output before it is scaled; where
    there are experts each token's state once for each that it is sent to, what they make of it, that weighted, and that
    in the tokens' order; of a mixer with a state, its scans. Where the model itself drops: masks of what attention and
    the MLP give, and, since no kernel then does without it, the attention matrix before and after, and its mask.
    """
    c, r = run.compute_bytes, run.rank
    h, q, kv, f = run.model.widths
    norms = 2 * (4 * h + 4 * h)
    inputs = 2 * h + 3 * q + 2 * kv + 2 * q  # norm output and residual, q/k rotated, k/v widened to q heads, output
    mlp = 2 * h + 4 * f + 4 * h * run.model.routed_states
    dropped = 2 * c * h if run.model.dropped_states else 0  # PyTorch's masks are factors, in the dtype of the states
    mixers = MASTER_BYTES * run.model.mixer_values
    dropped += 3 * c * run.model.num_heads * run.batches.longest_row if run.model.dropped_attention else 0
    return norms + c * (inputs + mlp + 14 * r) + dropped + mixers + _adapter_bytes(run)


def _adapter_bytes(run: RunShape) -> int:
    """Of a token in the adapters of a block: what dropout and DoRA hold beside products of a low rank."""
    blocks = [block.linears for block, _ in run.model.parts.blocks]
    inputs = max(sum(width for _, width, _ in linears) for linears in blocks)
    outputs = max(sum(width for _, _, width in linears) for linears in blocks)
    dropped = (run.compute_bytes + 1) * inputs if run.dropout else 0  # inputs again, and masks
    return dropped + (run.compute_bytes * outputs if run.dora else 0)  # what is scaled


def bias_bytes(run: RunShape) -> int:
    """Of a token's biases of attention, summed with the mask."""
    heads = run.model.num_heads if run.model.biased_attention else 0
    longest = max(run.batches.longest_row, run.batches.prompts.longest if run.batches.prompts else 0)
    return run.compute_bytes * heads * longest
