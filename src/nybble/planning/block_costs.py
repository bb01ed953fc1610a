"""What a block costs in bytes beside its weights: what it keeps between its forward and its backward pass, and what it
holds at the height of the latter. Symbols as in costs.py.
"""

from dataclasses import replace

from nybble.planning import cuda_costs
from nybble.planning.module_costs import modules_bytes, rounded_bytes, weights_read_bytes
from nybble.planning.run_shape import MASTER_BYTES, RunShape
from nybble.sizes import EXPERT_ROWS, EXPERT_SHARE, LAYER_INPUT_TOKENS

PLACE_BYTES = 8  # where a row of an expert comes from, and where it goes
ROUTED_BYTES, ROUTED_ROW_BYTES = 24, 32  # of a router's logits, their softmax and its gradients; of a row's weight
LSE_BYTES = 4  # fp32 log-sum-exp a head, and 1 / RMS
ATTENTION_TASKS = 8  # that attention's backward pass is cut into at least


def input_bytes(run: RunShape) -> int:
    """A block's input, which it keeps in any case."""
    return run.batches.tokens * run.compute_bytes * run.model.hidden_size


def expert_rows(run: RunShape, tokens: int) -> int:
    """Rows that experts get of so many tokens in a decoder block, at most: each expert's filled up to a multiple."""
    sent = tokens * run.model.passed_experts
    by_share = sent // EXPERT_SHARE if tokens > 2 * EXPERT_ROWS * EXPERT_SHARE else 0
    return sent + by_share + (EXPERT_ROWS - 1) * min(run.model.num_experts, sent)


def _rows_of_one(run: RunShape, tokens: int) -> int:
    """Rows of an expert that many tokens are sent to: four times as many as to the others, or all."""
    experts = run.model.num_experts
    return min(tokens, 4 * -(-tokens * run.model.passed_experts // experts)) if experts else 0


def kept_bytes(run: RunShape) -> int:
    """What one block keeps between its forward and its backward pass, where they differ in the mean; of one side of an
    encoder-decoder.
    """
    if run.model.kinds and run.path == "blocks":
        total = sum(count * kept_bytes(replace(run, model=kind)) for kind, count in run.model.kinds)
        return -(-total // run.model.num_layers)
    c = run.compute_bytes
    h, q, kv, _ = run.model.widths
    if run.keep == "nothing" or (run.path == "generic" and run.keep == "attention"):
        per_token = c * h
    elif run.path == "generic":
        per_token = 0
    elif run.keep == "attention":
        per_token = c * (h + q) + LSE_BYTES * run.model.num_heads
    else:
        states = h if run.model.parallel else 2 * h
        inner = 2 * q + 2 * kv + run.model.gate_up_width + layer_input_columns(run)
        per_token = c * (states + run.model.normed_width + inner + low_rank_columns(run))
        per_token += LSE_BYTES * run.model.num_heads + run.model.norm_bytes
        per_token += PLACE_BYTES * run.model.passed_experts
    whole = run.path == "generic" and run.keep == "everything"
    kept = modules_bytes(run) if whole else run.batches.tokens * per_token
    if run.path == "blocks" and run.keep == "everything":
        kept += expert_rows(run, run.batches.tokens) * (
            c * (1 + run.model.gated) * run.model.expert_width + PLACE_BYTES
        )
    if run.full and run.keep == "everything":
        kept += rounded_bytes(run)
    return kept if run.on_cpu else kept + cuda_costs.kept_rounding_bytes(run, kept)


def layer_input_columns(run: RunShape) -> int:
    """Of what a layer makes of an input of its own: the states that it reads, and its gate."""
    width = run.model.layer_input_width
    beside = run.beside if run.wide else 0
    return run.model.hidden_size + width + beside if width else 0


def beside_bytes(run: RunShape) -> int:
    """What layers read beside the states: inputs of their own, keys and values of others."""
    tokens = max(run.batches.tokens, run.batches.validation_tokens)
    return tokens * run.compute_bytes * run.model.beside_width


def making_inputs_bytes(run: RunShape) -> int:
    """What layers' own inputs are made of: two embeddings, and in fp32 what their norm was given, its squares and its
    result; decoder blocks make them for some tokens at a time.
    """
    tokens = max(run.batches.tokens, run.batches.validation_tokens)
    at_once = min(tokens, LAYER_INPUT_TOKENS) if run.path == "blocks" else tokens
    width = run.model.num_layers * run.model.layer_input_width
    return at_once * width * (2 * run.compute_bytes + 3 * MASTER_BYTES)


def low_rank_columns(run: RunShape) -> int:
    """Of the products with the A of a block; where rows are wide, of four, and beside q/k/v and gate and up."""
    if run.wide:
        return (6 + 2 * bool(run.model.layer_input_width)) * run.beside
    return sum(len(outputs) for _, outputs in run.model.products) * run.rank


def offloaded_bytes(run: RunShape) -> int:
    """What blocks keep in a file, or beside a GPU; 0 where they keep it in the memory that they compute in."""
    return kept_by_all(run) if run.offload else 0


def kept_by_all(run: RunShape) -> int:
    """What all blocks keep, if all keep the same."""
    return sum(side.model.num_layers * kept_bytes(side) for side in run.sides)


def working_bytes(run: RunShape) -> int:
    """What one block holds at the height of its backward pass besides what it kept.

    Decoder blocks: at SwiGLU's backward the gradients of output and of the MLP's input to down_proj, in whose place
    comes that input; or at attention's the gradients of x2, of its output and of q/k/v, and its scratch. Where it was
    recomputed also x2, q/k/v, attention's output, gate and up, the low-rank products, and what norms of heads and of
    what is added to the states were given; the latter have gradients of their own.
    Transformers' modules: what they keep within a block, where that was recomputed; else gradients.
    """
    c = run.compute_bytes
    h, q, kv, f = run.model.widths
    if run.path == "blocks":
        f = run.model.dense_width
        # What is normed for the MLP (where rows are wide, the gradient of y has its place), the gradients of y and of
        # SwiGLU's output, in whose place that output comes but in an expert that all tokens pass.
        states = 1 if run.wide else 2
        swiglu = run.batches.tokens * c * (states * h + (1 + bool(run.model.expert_width)) * f)
        swiglu += expert_bytes(run, run.batches.tokens)
        swiglu += run.batches.tokens * c * h * bool(run.model.added_norms or run.model.scaled_residual)
        swiglu += run.batches.tokens * c * 2 * f * run.dora  # gate and up, as they were
        attention = run.batches.tokens * c * 2 * (h + q + kv) + attention_scratch(run)
        if run.wide:  # gradients of the block's A and B, as they come and turned
            attention += 2 * MASTER_BYTES * run.adapter_parameters // run.model.num_layers
        recomputed = (
            h
            + run.model.normed_width
            + q
            + 2 * kv
            + run.model.gate_up_width
            + low_rank_columns(run)
            + layer_input_columns(run)
        )  # x2, norms, q/k/v, gate and up, a layer's own input
        attended = q  # attention's output
        made = {"nothing": recomputed + attended, "attention": recomputed, "everything": 0}[run.keep]
        roots = run.model.num_heads + run.model.norm_values * run.model.input_norms
        attended_rows = 0 if run.on_cpu or run.keep == "everything" else LSE_BYTES * roots
        copied = h + 3 * run.beside if run.wide else 0  # the gradient of y, wide; beside what is wide; of a low rank
        read = (
            run.batches.tokens * c * 2 * 2 * kv if run.model.beside_width else 0
        )  # gradients of keys that others read
        return max(swiglu, attention) + read + run.batches.tokens * (c * (made + copied) + attended_rows)
    read = weights_read_bytes(run) if run.full else 0
    if run.keep == "everything":
        return run.batches.tokens * c * (2 * h + 3 * f) + read  # gradients around SwiGLU
    return modules_bytes(run) + MASTER_BYTES * run.model.mixer_chunk + read


def expert_bytes(run: RunShape, tokens: int) -> int:
    """Of the backward pass of a block's experts: what they read, its gradient, summed in fp32 and rounded; what the
    router gives; what comes of the rows of one expert; and the gradients of their adapters.
    """
    if not run.model.expert_width:
        return 0
    c, (h, _, _, _) = run.compute_bytes, run.model.widths
    rows = expert_rows(run, tokens)
    routed = tokens * ((2 * c + 4) * h + ROUTED_BYTES * run.model.num_experts) + ROUTED_ROW_BYTES * rows
    one = c * _rows_of_one(run, tokens) * (2 * h + 7 * run.model.expert_width)
    learnt = MASTER_BYTES * run.expert_parameters // run.model.num_layers  # gradients, before they are added
    return routed + one + learnt


def attention_scratch(run: RunShape) -> int:
    """What the backward kernel of attention takes while it runs. On a CPU, for one thread: the keys and values of a
    document in three layouts and their gradients in fp32; and the fp32 partial sums of tasks that share a document and
    a head.
    """
    if not run.on_cpu:
        return cuda_costs.flash_scratch(run)
    batches = run.batches
    width = -(-run.model.query_width // run.model.num_heads // 16) * 16
    kv_heads = run.model.key_value_width * run.model.num_heads // run.model.query_width
    documents = max(1, batches.tokens // max(1, batches.longest_row))
    packed = 3 * run.compute_bytes * width * batches.longest_row + 8 * width * batches.longest_row
    parts = -(-ATTENTION_TASKS // (documents * kv_heads))
    if parts == 1:
        return packed
    ends = sum((part / parts) ** 0.5 for part in range(1, parts + 1))  # of equal cost, each from the first key on
    return packed + int(documents * kv_heads * ends * batches.longest_row * 8 * width)
