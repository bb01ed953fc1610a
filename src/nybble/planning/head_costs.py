"""What the loss head costs in bytes: states, chunks of logits, panels of its matrix. Symbols as in costs.py."""

from nybble.planning import cuda_costs
from nybble.planning.run_shape import DENSE_BYTES, MASTER_BYTES, RunShape
from nybble.sizes import ASKED_BYTES, DISTILLED_BYTES, WIDE_LOGIT_BYTES

FP32 = 4  # bytes


def chunk_rows(run: RunShape) -> int:
    """States whose logits are made at once, at most."""
    each = WIDE_LOGIT_BYTES if run.model.wide_logits else run.compute_bytes
    return run.rules.product_rows(run.model.vocab_size * each)


def logits_bytes(run: RunShape) -> int:
    """Room for a chunk of logits, which the loss head keeps, in fp32 too where something is done to them, and for a
    cap's slope; a head that is trained keeps none.
    """
    if run.trained_head or run.scored or run.asked:
        return 0
    multiple = run.rules.row_multiple
    needed = -(-max_targets(run) // multiple) * multiple
    widened = run.model.wide_logits and run.compute_bytes < FP32
    each = run.compute_bytes + FP32 * (widened + run.model.capped_logits)
    return min(chunk_rows(run), needed) * run.model.vocab_size * each


def head_bytes(run: RunShape) -> int:
    """The states around the loss head, and panels of a streamed one.

    States, for each supervised token: as they came, gathered, normed, and the gradients of these. A last norm of
    transformers', and one that is trained, keeps fp32 copies of its input and of what it normalised; on a GPU all that
    its backward pass holds is counted, which is more.
    """
    per_element = 6 * run.compute_bytes
    if run.path != "blocks" or run.trained_parameters:
        per_element = 4 * run.compute_bytes + 12 if run.on_cpu else cuda_costs.HEAD_BYTES
    states = run.batches.supervised * run.model.hidden_size * per_element
    return states + head_panels(run) + _own_logits(run) + compared_logits(run)


def compared_logits(run: RunShape) -> int:
    """A part of a chunk of logits, compared with a teacher's."""
    if not run.distilled:
        return 0
    row_bytes = DISTILLED_BYTES * run.model.vocab_size
    return row_bytes * min(run.rules.chunk_rows(row_bytes), run.batches.supervised)


def asked_logits(run: RunShape) -> int:
    """A chunk of a teacher's logits, whose largest are looked for."""
    if not run.asked:
        return 0
    row_bytes = ASKED_BYTES * run.model.vocab_size
    return row_bytes * min(run.rules.chunk_rows(row_bytes), max_targets(run))


def max_targets(run: RunShape) -> int:
    """States that are projected at once, in training or in an evaluation."""
    return max(run.batches.supervised, run.batches.validation_supervised)


def _own_logits(run: RunShape) -> int:
    """A chunk of logits of a head that is trained, as they come and in fp32, and the gradients of both."""
    if not run.trained_head:
        return 0
    c, vocabulary = run.compute_bytes, run.model.vocab_size
    rows = min(run.rules.chunk_rows((c + MASTER_BYTES) * vocabulary), run.batches.supervised)
    return rows * vocabulary * 2 * (c + MASTER_BYTES)


def head_gradient_bytes(run: RunShape) -> int:
    """Of a trained head's matrix: its gradient, and as the backward pass hands it on."""
    return 2 * MASTER_BYTES * run.model.vocab_size * run.model.hidden_size if run.full else 0


def widened_bytes(run: RunShape) -> int:
    """Room for a panel of the 16-bit head in the compute dtype, where that is wider; the loss head keeps it."""
    if run.trained_head or run.scored or run.compute_bytes == (MASTER_BYTES if run.full else DENSE_BYTES):
        return 0
    row_bytes = DENSE_BYTES * run.model.hidden_size
    rows = run.rules.head_panel_rows(run.model.vocab_size, row_bytes, widened=True, streamed=run.stream_ends)
    return rows * run.model.hidden_size * run.compute_bytes


def head_panels(run: RunShape) -> int:
    head = DENSE_BYTES * run.model.vocab_size * run.model.hidden_size
    return 2 * min(run.rules.panel_bytes, head) if run.stream_ends and not run.scored else 0
