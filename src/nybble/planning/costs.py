"""What each part of a training run costs in bytes: arithmetic on the sizes of a model's own parameters. What it has to
compute and to move is in work.py; what a base, a block and the loss head cost, in the files of these names beside it.

Symbols as in the QLoRA literature: T tokens in a micro-batch, h hidden width, L blocks, V vocabulary,
r rank, c bytes of the compute dtype, n elements of a weight, P adapter parameters.

A run's memory has several heights: the loss head on top of all that blocks keep, the backward pass of the last block
(everything is still kept) and of the last that computes something again, an evaluation. `predict` adds up each and
returns the parts of the highest. The optimizer's update adds nothing to what is there always, and saving copies
nothing: tensors are written from where they are.
"""

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from itertools import product
from typing import NamedTuple

from nybble.planning import cuda_costs, module_costs, tower_costs
from nybble.planning.base_costs import base_bytes, dense_bytes, end_bytes, resident_bytes
from nybble.planning.block_costs import (
    beside_bytes,
    expert_bytes,
    input_bytes,
    kept_by_all,
    kept_bytes,
    making_inputs_bytes,
    working_bytes,
)
from nybble.planning.head_costs import (
    asked_logits,
    compared_logits,
    head_bytes,
    head_gradient_bytes,
    head_panels,
    logits_bytes,
    widened_bytes,
)
from nybble.planning.module_costs import bias_bytes
from nybble.planning.run_shape import MASTER_BYTES, ModelShape, RunShape
from nybble.sizes import MAPPED_FROM, filled_numbers, panel_rows

EXPERT_PRODUCTS = 4  # gate and up, down, and their backwards: for each number of rows that an expert gets
MOST_PRODUCTS = 1024  # compiled ones that oneDNN's cache holds
MATRIX_BUFFERS = 10_000_000  # that the library for products in fp32 keeps; measured


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


GAPS_BF16, GAPS_FP32 = Gaps(0.0, 0.0, 0.12), Gaps(0.0, 0.0, 0.2)  # decoder blocks, whose large tensors lie in slabs
GAPS_EXPERTS = 0.5  # of what is at work in a block of experts, much of which PyTorch's own ops make, in the heap
GAPS_GENERIC = Gaps(1.1, 0.22, 1.2)  # transformers' modules, the heap trimmed between them; in fp32,
GAPS_GENERIC_BF16 = Gaps(1.1, 0.12, 1.2)  # in bf16,
GAPS_LARGE = Gaps(1.1, 0.36, 1.2)  # and where the MLP's inner tensors are large: fewer of them fit into a gap
LARGE_BYTES = 2**22
MARGIN, LEAST_MARGIN = 0.04, 10_000_000  # of what is counted; no measured plan lacked more, the libraries' own included


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


def trained_bytes(run: RunShape) -> int:
    """Modules that are trained whole: masters, their copies in the compute dtype where that is another, and the largest
    gradient on its way, in both.
    """
    copy = run.compute_bytes if run.compute_bytes != MASTER_BYTES else 0
    return (MASTER_BYTES + copy) * (run.trained_parameters + run.largest_trained)


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
    routed = expert_bytes(run, tokens) if run.path == "blocks" else routed
    f = run.model.dense_width
    block = tokens * (c * (4 * h + 2 * q + 2 * kv + 3 * f + 7 * run.rank) + bias_bytes(run)) + routed
    states = targets * h * (2 * c + 8) + head_panels(run) + max(asked_logits(run), compared_logits(run))
    return max(block, states)


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
    return EXPERT_PRODUCTS * run.product_bytes * min(numbers, run.model.num_layers * run.model.num_experts)


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
    kept = kept_by_all(run) - run.whole_blocks * kept_bytes(sides[-1])  # by those that compute something again
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
    sides = [(side, side.batches.tokens * run.compute_bytes * side.model.intermediate_size) for side in run.sides]
    shares = _shares_of_gaps(run, max(inner for _, inner in sides))
    kept = height.get(Part.KEPT, 0)
    if run.keep == "everything":  # what is mapped by itself leaves none
        kept -= sum(side.model.num_layers * 2 * inner for side, inner in sides if inner >= MAPPED_FROM)
    at_work = sum(height.get(name, 0) for name in (Part.AT_WORK, Part.HEAD, Part.EVALUATION, Part.TOWER))
    at_work -= head_panels(run) + head_gradient_bytes(run) if Part.HEAD in height else 0
    inputs = sum(side.model.num_layers * input_bytes(side) for side in run.sides)
    return int(shares.inputs * inputs + shares.kept * max(0, kept) + shares.at_work * at_work)


def _shares_of_gaps(run: RunShape, inner: int) -> Gaps:
    """Measured; `inner` bytes is the largest tensor of an MLP."""
    in_bf16 = run.compute_bytes == 2
    if run.path == "blocks":
        shares = GAPS_BF16 if in_bf16 else GAPS_FP32
        return shares._replace(at_work=GAPS_EXPERTS) if run.model.num_experts else shares
    if inner >= LARGE_BYTES:
        return GAPS_LARGE
    return GAPS_GENERIC_BF16 if in_bf16 else GAPS_GENERIC


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
