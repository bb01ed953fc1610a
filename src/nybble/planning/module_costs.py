"""What a block of transformers' modules holds for its backward pass, counted module by module where that is known: of
an encoder-decoder's encoder over prompts and its decoder over answers, whose second attention reads the encoder's
states; of a vision tower over patches. Symbols as in costs.py.
"""

from nybble.planning.run_shape import RunShape

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
