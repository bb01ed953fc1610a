"""What each part of a training run costs in bytes: arithmetic on the sizes of a model's own parameters. What it has to
compute and to move is in work.py.

Symbols as in the QLoRA literature: T tokens in a micro-batch, h hidden width, L blocks, V vocabulary,
r rank, c bytes of the compute dtype, n elements of a weight, P adapter parameters.

A run's memory has several heights: the loss head on top of all that blocks keep, the backward pass of the last block
(everything is still kept) and of the last that computes something again, an evaluation. `predict` adds up each and
returns the parts of the highest. The optimizer's update adds nothing to what is there always, and saving copies
nothing: tensors are written from where they are.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from itertools import product
from typing import NamedTuple

from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.planning import cuda_costs, module_costs, tower_costs
from nybble.planning.run_shape import ModelShape, RunShape
from nybble.sizes import (
    ASKED_BYTES,
    DISTILLED_BYTES,
    EXPERT_ROWS,
    EXPERT_SHARE,
    LAYER_INPUT_TOKENS,
    filled_numbers,
    panel_rows,
)
from nybble.sources.parts import BlockParts

DENSE_BYTES = 2  # embeddings and head stay in 16 bits
MASTER_BYTES = 4  # fp32 adapters and their gradients
PLACE_BYTES = 8  # where a row of an expert comes from, and where it goes
ROUTED_BYTES, ROUTED_ROW_BYTES = 24, 32  # of a router's logits, their softmax and its gradients; of a row's weight
EXPERT_PRODUCTS = 4  # gate and up, down, and their backwards: for each number of rows that an expert gets
EXPERT_PRODUCT_BYTES = 1_100_000  # that oneDNN keeps of one on AMX, 0.72 to 1.21 MB; measured
LSE_BYTES = 4  # fp32 log-sum-exp a head, and 1 / RMS
MOST_PRODUCTS = 1024  # what its cache holds
MAPPED_BYTES = 2**25  # tensors from here on are mapped by themselves and leave no gaps in the C library's heap
MATRIX_BUFFERS = 10_000_000  # that the library for products in fp32 keeps; measured
ATTENTION_TASKS = 8  # that attention's backward pass is cut into at least


class Gaps(NamedTuple):
    """Free memory in the C library's heap between what it holds, as shares of what lies around it; measured.

    Args:
        inputs: of the inputs of all blocks, which are there from block to block.
        kept: of all that blocks keep.
        at_work: of what comes and goes.
    """

    inputs: float
    kept: float
    at_work: float


GAPS_BF16, GAPS_FP32 = Gaps(0.3, 0.30, 1.0), Gaps(1.8, 0.04, 0.27)  # decoder blocks
GAPS_GENERIC = Gaps(1.1, 0.22, 1.2)  # transformers' modules, the heap trimmed between them
MARGIN, LEAST_MARGIN = 0.04, 10_000_000  # of what is counted; no measured plan lacked more, the libraries' own included
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # linears that are given the same tensor


class Part(StrEnum):
    """What a run's memory consists of; the value is its name in tables and in `plan.json`."""

    PROCESS = "the process itself"
    BASE = "base weights"
    WEIGHT_GRADIENTS = "weight gradients"
    DENSE = "weights not in four bits"
    STREAMED = "blocks on their way"
    ENDS = "embeddings, head, norms"
    ADAPTERS = "adapters"
    TRAINED = "modules trained whole"
    OPTIMIZER = "optimizer state"
    PAGES = "pages of the optimizer"
    LOGITS = "room for logits"
    PANEL = "a panel of the head, widened"
    DENSE_WEIGHT = "one dense weight"
    DENSE_BLOCK = "a block's dense weights"
    GRADIENTS = "adapter gradients"
    KEPT = "kept by blocks"
    HEAD = "loss head"
    BATCH = "ids and angles"
    LAYER_INPUTS = "what layers read beside states"
    AT_WORK = "one block at work"
    PICTURES = "pictures"
    TOWER = "pictures being read"
    EVALUATION = "an evaluation"
    PRODUCTS = "compiled products"
    GAPS = "gaps in the heap"
    WORKSPACE = "workspace of the libraries"
    RESERVED = "reserved beside what is used"
    GRAPHS = "memory of the graphs"
    MARGIN = "margin"


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
    return _kept_by_all(run) if run.offload else 0


def _kept_by_all(run: RunShape) -> int:
    """What all blocks keep, if all keep the same."""
    return sum(side.model.num_layers * kept_bytes(side) for side in run.sides)


def streamed_bytes(run: RunShape) -> int:
    """The blocks of a base that pass through memory; 0 where all of them are resident."""
    if run.resident_blocks is None:
        return 0
    stored = (run.spec, run.average_bits, run.compute_bytes)
    return base_bytes(run.model, *stored) - resident_bytes(run.model, *stored, run.resident_blocks)


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
        swiglu += _expert_bytes(run, run.batches.tokens)
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


def _expert_bytes(run: RunShape, tokens: int) -> int:
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
    if not module_costs.is_counted(run):
        return run.batches.tokens * module_bytes(run)
    return module_costs.held_bytes(run) + run.batches.tokens * _adapter_bytes(run)


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


def _bias_bytes(run: RunShape) -> int:
    """Of a token's biases of attention, summed with the mask."""
    heads = run.model.num_heads if run.model.biased_attention else 0
    longest = max(run.batches.longest_row, run.batches.prompts.longest if run.batches.prompts else 0)
    return run.compute_bytes * heads * longest


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


def logits_bytes(run: RunShape) -> int:
    """Room for a chunk of logits, which the loss head keeps; a head that is trained keeps none."""
    if run.trained_head or run.scored or run.asked:
        return 0
    c = run.compute_bytes
    fit = run.rules.chunk_rows(run.model.vocab_size * c)
    multiple = run.rules.row_multiple
    needed = -(-max_targets(run) // multiple) * multiple
    return min(fit, needed) * run.model.vocab_size * c


def head_bytes(run: RunShape) -> int:
    """The states around the loss head, and panels of a streamed one.

    States, for each supervised token: gathered, normed, their gradients chunk by chunk and joined; the last norm
    keeps fp32 copies of its input and of what it normalised. On a GPU all that its backward pass holds, which is more.
    """
    per_element = 4 * run.compute_bytes + 12 if run.on_cpu else cuda_costs.HEAD_BYTES
    states = run.batches.supervised * run.model.hidden_size * per_element
    return states + _panels(run) + _own_logits(run) + _compared_logits(run)


def _compared_logits(run: RunShape) -> int:
    """A part of a chunk of logits, compared with a teacher's."""
    if not run.distilled:
        return 0
    row_bytes = DISTILLED_BYTES * run.model.vocab_size
    return row_bytes * min(run.rules.chunk_rows(row_bytes), run.batches.supervised)


def _asked_logits(run: RunShape) -> int:
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


def trained_bytes(run: RunShape) -> int:
    """Modules that are trained whole: masters, their copies in the compute dtype where that is another, and the largest
    gradient on its way, in both.
    """
    copy = run.compute_bytes if run.compute_bytes != MASTER_BYTES else 0
    return (MASTER_BYTES + copy) * (run.trained_parameters + run.largest_trained)


def head_gradient_bytes(run: RunShape) -> int:
    """Of a trained head's matrix: its gradient, and as the backward pass hands it on."""
    return 2 * MASTER_BYTES * run.model.vocab_size * run.model.hidden_size if run.full else 0


def validation_bytes(run: RunShape) -> int:
    """Height of an evaluation, or of asking a reference or a teacher: one block forward at a time, its input and
    output; then the states of the head. Of an encoder-decoder the larger of both halves, and what is handed on.
    """
    return max(map(_forward_bytes, run.sides)) + module_costs.handed_on_bytes(run) // 2


def _forward_bytes(run: RunShape) -> int:
    c, batches = run.compute_bytes, run.batches
    h, q, kv, f = run.model.widths
    tokens, targets = batches.validation_tokens, batches.validation_supervised
    if run.asks_reference or run.asked:
        tokens, targets = max(tokens, batches.tokens), max(targets, batches.supervised)
    copies = 4 * h * run.model.routed_states + 3 * run.model.expert_width * run.model.passed_experts
    routed = tokens * c * copies
    routed = _expert_bytes(run, tokens) if run.path == "blocks" else routed
    f = run.model.dense_width
    block = tokens * (c * (4 * h + 2 * q + 2 * kv + 3 * f + 7 * run.rank) + _bias_bytes(run)) + routed
    states = targets * h * (2 * c + 8) + _panels(run) + max(_asked_logits(run), _compared_logits(run))
    return max(block, states)


def widened_bytes(run: RunShape) -> int:
    """Room for a panel of the 16-bit head in the compute dtype, where that is wider; the loss head keeps it."""
    if run.trained_head or run.scored or run.compute_bytes == (MASTER_BYTES if run.full else DENSE_BYTES):
        return 0
    row_bytes = DENSE_BYTES * run.model.hidden_size
    rows = run.rules.head_panel_rows(run.model.vocab_size, row_bytes, widened=True, streamed=run.stream_ends)
    return rows * run.model.hidden_size * run.compute_bytes


def _panels(run: RunShape) -> int:
    head = DENSE_BYTES * run.model.vocab_size * run.model.hidden_size
    return 2 * min(run.rules.panel_bytes, head) if run.stream_ends and not run.scored else 0


def compiled_products(shape: ModelShape, *ranks: int) -> tuple[int, int]:
    """Different matrix products of decoder blocks of these ranks for one number of tokens: those of the forward pass,
    and those that the backward pass adds. Layers of the same widths, in buffers of the same width, share one.

    Each is named by what tells it apart: its widths, and how far apart the rows of its operands lie.
    """
    forward: set[tuple[object, ...]] = set()
    backward: set[tuple[object, ...]] = set()
    products = {each for kind, _ in shape.alone for each in kind.products}
    for rank, (width, outputs) in product(ranks, products):
        columns, row = rank * len(outputs), sum(outputs)
        forward.add(("low rank", width, columns))
        backward |= {("adapters", columns, width, columns, width), ("add", columns, width, columns, width)}
        for i, out in enumerate(outputs):
            forward |= {("base", width, out, row, len(outputs)), ("add", rank, out, columns, row)}
            backward |= {("low rank back", out, row, columns), ("adapters", rank, out, columns, row)}
            backward.add(("base back", out, width, row, i > 0))
    return len(forward), len(backward - forward)


def written_out_bytes(run: RunShape) -> dict[Part, int]:
    """What four-bit weights are written out into: one at a time, decoder blocks some rows of one; and one more where
    DoRA asks for the norms of its rows or scales those of 16 bits. Or on a GPU, for decoder blocks, all of a block,
    with room for adapters beside them (`layers/augmented.py`), as if each layer shared its input with two more.
    """
    if not run.wide:
        whole, second = run.model.largest_linear, 0
        if run.path == "blocks" and not run.model.expert_width:
            written = _panel_elements(run)
        else:
            written = whole
            second = run.model.expert_width * run.model.hidden_size if run.path == "blocks" else 0  # of an expert's two
        written = 0 if run.spec is None else written
        return {Part.DENSE_WEIGHT: run.compute_bytes * (written + run.dora * whole + second)}
    elements = (
        sum((rows + run.beside) * (columns + run.beside) for _, rows, columns in block.linears)
        for block, _ in run.model.parts.blocks
    )
    return {Part.DENSE_BLOCK: run.compute_bytes * max(elements, default=0)}


def _panel_elements(run: RunShape) -> int:
    """Of a weight's rows that decoder blocks write out at a time, the most."""
    if run.spec is None:
        return 0
    most, panels = run.rules.weight_panel_bytes, [0]
    for block, _ in run.model.parts.blocks:
        for _, width, rows in block.linears:
            panels.append(width * panel_rows(rows, run.compute_bytes * width, most, run.spec.row_multiple(width)))
    return max(panels)


def compiled_bytes(run: RunShape) -> int:
    """What libraries of matrix products keep: oneDNN the compiled ones of each number of tokens and of the head's
    chunks; the other, where products in fp32 go, its buffers.
    """
    if not run.on_cpu or run.compute_bytes != 2:
        return MATRIX_BUFFERS if run.on_cpu else 0
    counts, batches = 0, run.batches
    for side in run.sides:
        forward, backward = compiled_products(side.model, run.rank, *run.other_ranks)
        counts += batches.token_counts * (forward + backward) + batches.validation_counts * forward
    head = 2 * min(1 + batches.token_counts, -(-batches.supervised // run.rules.row_multiple))
    return run.product_bytes * min(MOST_PRODUCTS, counts + head) + _expert_product_bytes(run)


def _expert_product_bytes(run: RunShape) -> int:
    """Of the products of experts' rows: of each number that there may be, for an expert may get all tokens."""
    if run.path != "blocks" or not run.model.expert_width:
        return 0
    numbers = filled_numbers(max(run.batches.tokens, run.batches.validation_tokens))
    return EXPERT_PRODUCTS * EXPERT_PRODUCT_BYTES * min(numbers, run.model.num_layers * run.model.num_experts)


def predict(run: RunShape) -> dict[Part, int]:
    """Bytes by component at the highest moment of a run, above what the process itself takes; they add up to the peak.

    Raises:
        AssertionError: more blocks resident than there are.
    """
    if run.filled_up:
        run = replace(run, batches=run.batches.filled_up())
    masters = run.learnt_parameters * MASTER_BYTES
    always = {Part.BASE: masters} if run.full else _frozen_and_adapters(run)
    always[Part.OPTIMIZER] = int(run.learnt_parameters * run.adam_bytes) if run.page_bytes is None else 0
    always[Part.PAGES] = run.page_bytes or 0
    sides = run.sides  # of an encoder-decoder its halves, else the one there is
    whole = replace(sides[-1], keep="everything") if run.whole_blocks else sides[-1]
    kept = _kept_by_all(run) - run.whole_blocks * kept_bytes(sides[-1])  # by those that compute something again
    all_kept, moving = kept + run.whole_blocks * kept_bytes(whole), 0
    kept_by_first = sides[0].model.num_layers * kept_bytes(sides[0])
    if run.offload and run.on_cpu:
        kept = all_kept = kept_by_first = 0
        moving = 2 * max(map(input_bytes, sides))  # on their way to and from the file
    elif run.offload:  # one block's have not left or are used, one's are on their way back
        kept = all_kept = kept_by_first = moving = max(map(kept_bytes, sides))
    handed_on = module_costs.handed_on_bytes(run)
    always[Part.LOGITS] = logits_bytes(run)
    always[Part.PANEL] = widened_bytes(run)
    always |= written_out_bytes(run)
    always[Part.WEIGHT_GRADIENTS if run.full else Part.GRADIENTS] = masters  # they stay from step to step
    always[Part.BATCH] = 0 if run.on_cpu else cuda_costs.batch_bytes(run)
    heights = [
        {Part.KEPT: all_kept + handed_on, Part.HEAD: head_bytes(run) + head_gradient_bytes(run)},
        {Part.KEPT: all_kept + handed_on, Part.AT_WORK: working_bytes(whole) + moving},
        {Part.KEPT: kept + handed_on, Part.AT_WORK: working_bytes(sides[-1]) + moving},
        {Part.KEPT: kept_by_first + handed_on, Part.AT_WORK: working_bytes(sides[0]) + moving},
    ]
    forward = [{Part.EVALUATION: validation_bytes(run)}]  # nothing is learnt
    always[Part.LAYER_INPUTS] = beside_bytes(run)
    forward.append({Part.AT_WORK: making_inputs_bytes(run)})
    always[Part.PICTURES] = tower_costs.held_bytes(run)
    if run.tower is not None:
        forward.append({Part.TOWER: max(tower_costs.making_bytes(run), tower_costs.reading_bytes(run))})
    highest = max(forward if run.asked else [*heights, *forward], key=lambda height: sum(height.values()))
    parts = always | highest
    parts[Part.PRODUCTS] = compiled_bytes(run)
    parts[Part.GAPS] = _gaps(run, highest) if run.on_cpu else 0
    parts[Part.WORKSPACE] = 0 if run.on_cpu else cuda_costs.WORKSPACE_BYTES
    parts[Part.RESERVED] = 0 if run.on_cpu else cuda_costs.allocator_bytes(run)
    parts[Part.GRAPHS] = cuda_costs.graph_bytes(heights) if run.graphs else 0
    parts[Part.MARGIN] = max(LEAST_MARGIN, int(MARGIN * sum(parts.values()))) if run.on_cpu else 0
    return {name: num_bytes for name, num_bytes in parts.items() if num_bytes}


def _gaps(run: RunShape, height: Mapping[Part, int]) -> int:
    """Bytes of gaps in the C library's heap at a moment of these parts, once it no longer grows from step to step; of a
    model that is asked, as much as what comes and goes, measured.
    """
    if run.asked:
        return height[Part.EVALUATION]
    shares = GAPS_GENERIC if run.path == "generic" else GAPS_BF16 if run.compute_bytes == 2 else GAPS_FP32
    kept = height.get(Part.KEPT, 0)
    for side in run.sides:
        gate_up = 2 * side.batches.tokens * run.compute_bytes * side.model.intermediate_size
        if gate_up >= MAPPED_BYTES and run.keep == "everything":
            kept -= side.model.num_layers * gate_up
    at_work = sum(height.get(name, 0) for name in (Part.AT_WORK, Part.HEAD, Part.EVALUATION, Part.TOWER))
    at_work -= _panels(run) + head_gradient_bytes(run) if Part.HEAD in height else 0
    inputs = sum(side.model.num_layers * input_bytes(side) for side in run.sides)
    return int(shares.inputs * inputs + shares.kept * max(0, kept) + shares.at_work * at_work)


def _frozen_and_adapters(run: RunShape) -> dict[Part, int]:
    """The base as it lies in memory, and what is trained beside it."""
    c, layers = run.compute_bytes, run.model.num_layers
    streamed = run.resident_blocks is not None
    resident = layers if run.resident_blocks is None else run.resident_blocks
    assert resident <= layers, (resident, layers)
    stored = (run.spec, run.block_bits, c)  # how a linear's weight is
    buffers = resident_bytes(run.model, *stored, min(run.rules.block_buffers, layers - resident)) if streamed else 0
    whole = base_bytes(run.model, run.spec, run.average_bits, c)
    copied = run.adapter_parameters - run.expert_parameters
    copies = 3 * c * copied // 2 if run.path == "blocks" and not run.wide else 0
    return {
        Part.BASE: min(whole, resident_bytes(run.model, *stored, resident)),
        Part.DENSE: c * run.model.parts.matrix_elements,
        Part.STREAMED: buffers,
        Part.ENDS: dense_bytes(run.model, c) - (end_bytes(run.model, c) if run.stream_ends else 0),
        Part.ADAPTERS: run.adapter_parameters * MASTER_BYTES + copies,
        Part.TRAINED: trained_bytes(run),
    }
