"""What each part of a training run costs in bytes and in work: arithmetic on the sizes of a model's own parameters.

Symbols as in the QLoRA literature: T tokens in a micro-batch, h hidden width, L blocks, V vocabulary,
r rank, c bytes of the compute dtype, n elements of a weight, P adapter parameters.

A run's memory has several heights: the loss head on top of all that blocks keep, the backward pass of the last
block (everything is still kept) and of the first (every gradient exists), an evaluation. `predict` adds up each and
returns the parts of the highest. The optimizer's update adds nothing to what is there always, and saving copies
nothing: tensors are written from where they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.layers.dense import narrow_ends
from nybble.layers.loss_head import LARGE_HEAD_BYTES, PANEL_ROWS
from nybble.sources.inventory import BlockParts, Inventory, take_inventory

if TYPE_CHECKING:
    from collections.abc import Collection

    from transformers import PreTrainedModel

    from nybble.layers.decoder_block import Keep

DENSE_BYTES = 2  # embeddings and head stay in 16 bits
MASTER_BYTES = 4  # fp32 adapters and their gradients
ADAM_BYTES = 8  # two fp32 moments
ADAM_8BIT_BYTES = 2 + 8 / 256  # two codes, two fp32 scales for each 256
FULL_BYTES = 12  # full fine-tuning in 16 bits, a parameter: weight 2, gradient 2, two fp32 moments
LSE_BYTES = 4  # fp32 log-sum-exp a head, and 1 / RMS
ROW_MULTIPLE = 64  # of rows of a chunk of logits
STREAM_BUFFERS = 2  # blocks of a streamed base in memory besides the resident ones: at work, and the next
PRODUCT_BYTES = 590_000  # oneDNN keeps for each product of bf16 matrices that it has compiled; measured
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


@dataclass(frozen=True)
class ModelShape:
    """The widths of a decoder that decide what it costs.

    Args:
        parts: its parameters, as they are.
        hidden_size: h, of the states between blocks.
        num_heads: of attention; it matters to decoder blocks, whose families all have them.
        query_width, key_value_width: of all heads together; h where no layer is called so.
        intermediate_size: of the widest MLP that a token passes, with all of its experts.
        narrow_ends: embedding and head stay in 16 bits whatever is computed in.
    """

    parts: Inventory
    hidden_size: int
    num_heads: int
    query_width: int
    key_value_width: int
    intermediate_size: int
    narrow_ends: bool

    @classmethod
    def of(cls, model: "PreTrainedModel", in_four_bits: "Collection[str] | None" = None) -> "ModelShape":
        """Read off the model's own parameters; it may be on the meta device.

        Args:
            in_four_bits: the linear layers that are or will be; all of the blocks' if not given.
        """
        parts = take_inventory(model, in_four_bits)
        sizes = [_linears(block) for block, _ in parts.blocks]
        hidden = _hidden_size(parts)
        query = max((found["q_proj"][1] for found in sizes if "q_proj" in found), default=hidden)
        key_value = max((found["k_proj"][1] for found in sizes if "k_proj" in found), default=query)
        heads = getattr(model.config.get_text_config(), "num_attention_heads", None)
        return cls(
            parts,
            hidden,
            heads if isinstance(heads, int) else 1,
            query,
            key_value,
            max((_mlp_width(block, hidden) for block, _ in parts.blocks), default=hidden),
            bool(narrow_ends(model)),
        )

    @property
    def num_layers(self) -> int:
        return self.parts.num_blocks

    @property
    def vocab_size(self) -> int:
        return self.parts.head[0]

    @property
    def parameters(self) -> int:
        """Number of all parameters of the model."""
        return self.parts.elements

    @property
    def largest_linear(self) -> int:
        """Elements of the largest linear layer of a block."""
        return max((i * o for block, _ in self.parts.blocks for _, i, o in block.linears), default=0)

    @property
    def multiplied_elements(self) -> int:
        """Elements of the blocks' matrices that one token is multiplied with."""
        return sum(count * (block.linear_elements + _active_elements(block)) for block, count in self.parts.blocks)

    @property
    def last_products(self) -> int:
        """Elements of the linears that a block ends with, whose products are never computed again."""
        return sum(
            count * rows * columns
            for block, count in self.parts.blocks
            for name, rows, columns in block.linears
            if name.rpartition(".")[2] == "down_proj"
        )


def _linears(block: BlockParts) -> dict[str, tuple[int, int]]:
    """Last part of the name -> (in, out)."""
    return {name.rpartition(".")[2]: (rows, columns) for name, rows, columns in block.linears}


def _hidden_size(parts: Inventory) -> int:
    """What the head reads; where blocks are wider than their ends, what most of their linears take."""
    widths = [i for block, count in parts.blocks for _, i, _ in block.linears for _ in range(count)]
    width = parts.head[1]
    return width if not widths or width in widths else max(set(widths), key=widths.count)


def _mlp_width(block: BlockParts, hidden: int) -> int:
    """Of the MLP: what its last layer takes; where none is called as in Llama, the widest there is. Experts: those that
    a token passes.
    """
    linears = _linears(block)
    dense = linears["down_proj"][0] if "down_proj" in linears else 0
    inner = [size for shape in _experts(block) for size in shape[1:] if size != hidden]
    experts = _active(block) * min(inner, default=hidden)
    if not dense and not experts:
        return max((max(i, o) for _, i, o in block.linears), default=hidden)
    return dense + experts


def _experts(block: BlockParts) -> list[tuple[int, ...]]:
    """Shapes of stacks of matrices, one for each expert."""
    return [shape for _, shape in block.matrices if len(shape) == 3 and min(shape[1:]) > 1]


def _active(block: BlockParts) -> int:
    """Experts that a token passes; all of them where the model does not say."""
    stacked = max((shape[0] for shape in _experts(block)), default=0)
    return stacked if block.active_experts is None else min(stacked, block.active_experts)


def _active_elements(block: BlockParts) -> int:
    """Elements of the matrices not in four bits that a token is multiplied with."""
    experts = sum(_active(block) * rows * columns for _, rows, columns in _experts(block))
    return experts + sum(shape[0] * shape[1] for _, shape in block.matrices if len(shape) == 2)


@dataclass(frozen=True)
class MicroBatches:
    """What the micro-batches of one size come to, over a run.

    Args:
        tokens: of the largest, padding included.
        supervised: of those, how many are projected by the head at most.
        longest_row: tokens of the longest row.
        token_counts: different numbers of tokens that training meets.
        held_out_tokens, held_out_supervised: the same of evaluations.
        held_out_counts: different numbers of tokens that only evaluations meet.
        heaviest, heaviest_held_out: the rows of the largest micro-batches, by number; empty where there is no data.
    """

    tokens: int
    supervised: int
    longest_row: int
    token_counts: int
    held_out_tokens: int
    held_out_supervised: int
    held_out_counts: int
    heaviest: tuple[int, ...] = ()
    heaviest_held_out: tuple[int, ...] = ()

    def halved(self) -> "MicroBatches":
        """With rows of half the length."""
        half = {name: -(-getattr(self, name) // 2) for name in ("tokens", "supervised", "longest_row")}
        half |= {name: -(-getattr(self, name) // 2) for name in ("held_out_tokens", "held_out_supervised")}
        return replace(self, **half)


@dataclass(frozen=True)
class TrainingShape:
    """The choices of a run that decide what it costs.

    Args:
        batches: T and the other sizes of micro-batches.
        compute_bytes: c.
        spec: format of the base, or None for 16 bits.
        mixed_bits: bits a weight where the layers of the base have several formats.
        path: "blocks" for nybble's decoder blocks, "generic" for transformers' modules.
        keep: what each block keeps: "nothing" (its input), "attention" or "everything".
        chunk_bytes: what one chunk of logits may take.
        micro_batches: of one optimizer step.
        resident_blocks: of a streamed base; None where the whole base is resident.
        stream_ends: the embedding's rows and the head's panels are read where they are used.
        panel_bytes: of the head, where it is streamed or larger than a panel.
        adam_bytes: of optimizer state a parameter.
        page_bytes: None where optimizer state is resident, else what the buffers of its pages take.
        offload: what blocks keep goes to a file.
        dropout: on the adapters' inputs, on the generic path.
        on_cpu: where oneDNN's products and gaps in the C library's heap come on top.
        full: every weight is trained; then rank and adapters are 0.
    """

    batches: MicroBatches
    adapter_parameters: int
    rank: int
    compute_bytes: int
    spec: QuantSpec | None
    path: str
    keep: "Keep"
    chunk_bytes: int
    mixed_bits: float | None = None
    micro_batches: int = 2
    resident_blocks: int | None = None
    stream_ends: bool = False
    panel_bytes: int = 2**26
    adam_bytes: float = ADAM_BYTES
    page_bytes: int | None = None
    offload: bool = False
    dropout: bool = False
    on_cpu: bool = True
    full: bool = False


def block_bytes(
    block: BlockParts, spec: QuantSpec | None, mixed_bits: float | None = None, dense: int = DENSE_BYTES
) -> int:
    """The linear layers of one block; where layers have several formats, of a mean one.

    Args:
        dense: bytes of a weight that is not in four bits.
    """
    if spec is None:
        return dense * block.linear_elements
    if mixed_bits is not None:
        return round(block.linear_elements * mixed_bits / 8)
    return sum(spec.bytes(i * o) for _, i, o in block.linears)


def base_bytes(
    shape: ModelShape, spec: QuantSpec | None, mixed_bits: float | None = None, dense: int = DENSE_BYTES
) -> int:
    """The linear layers of all blocks."""
    return resident_bytes(shape, spec, mixed_bits, dense, shape.num_layers)


def resident_bytes(
    shape: ModelShape, spec: QuantSpec | None, mixed_bits: float | None, dense: int, num_blocks: int
) -> int:
    """The linear layers of so many blocks, where they differ of the largest."""
    sizes = [(block_bytes(block, spec, mixed_bits, dense), count) for block, count in shape.parts.blocks]
    total = 0
    for size, count in sorted(sizes, reverse=True):
        total += min(count, num_blocks) * size
        num_blocks -= min(count, num_blocks)
    return total


def mean_bits(shape: ModelShape, formats: BaseFormats) -> float:
    """Bits a weight, scales included, of a base whose layers have several formats."""
    sizes = {name: i * o for block, _ in shape.parts.blocks for name, (i, o) in _linears(block).items()}
    total = stored = 0
    for layer in formats.layers:
        numel = sizes.get(layer.rpartition(".")[2], shape.largest_linear)
        total, stored = total + numel, stored + formats.of(layer).bytes(numel)
    return 8 * stored / total


def end_bytes(shape: ModelShape, dense: int = DENSE_BYTES) -> int:
    """Embeddings and head; as wide as what else is not in four bits where they cannot stay in 16."""
    return (DENSE_BYTES if shape.narrow_ends else dense) * shape.parts.end_elements


def dense_bytes(shape: ModelShape, dense: int = DENSE_BYTES) -> int:
    """Embeddings, head, norms, and what else lies around the blocks.

    Args:
        dense: bytes of a weight that is neither in four bits nor in embedding and head.
    """
    return end_bytes(shape, dense) + dense * (shape.parts.vector_elements + shape.parts.around_elements)


def input_bytes(shape: ModelShape, training: TrainingShape) -> int:
    """A block's input, which it keeps in any case."""
    return training.batches.tokens * training.compute_bytes * shape.hidden_size


def kept_bytes(shape: ModelShape, training: TrainingShape) -> int:
    """What one block keeps between its forward and its backward pass."""
    c = training.compute_bytes
    h, q, kv, f = shape.hidden_size, shape.query_width, shape.key_value_width, shape.intermediate_size
    if training.keep == "nothing" or (training.path == "generic" and training.keep == "attention"):
        per_token = c * h
    elif training.path == "generic":
        per_token = module_bytes(shape, training)
    elif training.keep == "attention":
        per_token = c * (h + q) + LSE_BYTES * shape.num_heads
    else:
        per_token = c * (2 * h + 2 * q + 2 * kv + 2 * f + 7 * training.rank) + LSE_BYTES * (shape.num_heads + 2)
    return training.batches.tokens * per_token


def working_bytes(shape: ModelShape, training: TrainingShape) -> int:
    """What one block holds at the height of its backward pass besides what it kept.

    Decoder blocks: at SwiGLU's backward the gradients of output and of the MLP's input to down_proj, SwiGLU's
    output; or at attention's the gradients of x2, of its output and of q/k/v, and its scratch. Where it was recomputed
    also x2, q/k/v, attention's output, gate and up, the low-rank products.
    Transformers' modules: what they keep within a block, where that was recomputed; else gradients.
    """
    c, r = training.compute_bytes, training.rank
    h, q, kv, f = shape.hidden_size, shape.query_width, shape.key_value_width, shape.intermediate_size
    if training.path == "blocks":
        swiglu = training.batches.tokens * c * (h + 2 * f)  # gradients of y and of SwiGLU's output, that output
        attention = training.batches.tokens * c * 2 * (h + q + kv) + attention_scratch(shape, training)
        recomputed = h + q + 2 * kv + 2 * f + 7 * r  # x2, q/k/v, gate and up
        attended = q  # attention's output
        made = {"nothing": recomputed + attended, "attention": recomputed, "everything": 0}[training.keep]
        return max(swiglu, attention) + training.batches.tokens * c * made
    if training.keep == "everything":
        return training.batches.tokens * c * (2 * h + 3 * f)  # gradients around SwiGLU
    return training.batches.tokens * module_bytes(shape, training)


def module_bytes(shape: ModelShape, training: TrainingShape) -> int:
    """What transformers' modules of one block hold for their backward pass, per token: fp32 copies inside the two norms
    (input and normalised), then in the compute dtype the inputs of every product and of every elementwise function;
    with dropout each adapter's input once more, and its mask.
    """
    c, r = training.compute_bytes, training.rank
    h, q, kv, f = shape.hidden_size, shape.query_width, shape.key_value_width, shape.intermediate_size
    norms = 2 * (4 * h + 4 * h)
    inputs = 2 * h + 3 * q + 2 * kv + 2 * q  # norm output and residual, q/k rotated, k/v widened to q heads, output
    mlp = 2 * h + 4 * f
    inputs_again = max(sum(width for _, width, _ in block.linears) for block, _ in shape.parts.blocks)
    dropped = (c + 1) * inputs_again if training.dropout else 0  # inputs again, and masks
    return norms + c * (inputs + mlp + 14 * r) + dropped


def attention_scratch(shape: ModelShape, training: TrainingShape) -> int:
    """What the backward kernel of attention takes while it runs, for one thread: the keys and values of a document in
    three layouts and their gradients in fp32; and the fp32 partial sums of tasks that share a document and a head.
    """
    batches = training.batches
    width = -(-shape.query_width // shape.num_heads // 16) * 16
    kv_heads = shape.key_value_width * shape.num_heads // shape.query_width
    documents = max(1, batches.tokens // max(1, batches.longest_row))
    packed = 3 * training.compute_bytes * width * batches.longest_row + 8 * width * batches.longest_row
    parts = -(-ATTENTION_TASKS // (documents * kv_heads))
    if parts == 1:
        return packed
    ends = sum((part / parts) ** 0.5 for part in range(1, parts + 1))  # of equal cost, each from the first key on
    return packed + int(documents * kv_heads * ends * batches.longest_row * 8 * width)


def logits_bytes(shape: ModelShape, training: TrainingShape) -> int:
    """Room for a chunk of logits, which the loss head keeps."""
    c = training.compute_bytes
    fit = max(ROW_MULTIPLE, training.chunk_bytes // (shape.vocab_size * c) // ROW_MULTIPLE * ROW_MULTIPLE)
    needed = -(-max(training.batches.supervised, training.batches.held_out_supervised) // ROW_MULTIPLE) * ROW_MULTIPLE
    return min(fit, needed) * shape.vocab_size * c


def head_bytes(shape: ModelShape, training: TrainingShape) -> int:
    """The states around the loss head, and panels of a streamed one.

    States, for each supervised token: gathered, normed, their gradients chunk by chunk and joined; the last norm
    keeps fp32 copies of its input and of what it normalised.
    """
    states = training.batches.supervised * shape.hidden_size * (4 * training.compute_bytes + 12)
    return states + _panels(shape, training)


def held_out_bytes(shape: ModelShape, training: TrainingShape) -> int:
    """Height of an evaluation: one block forward at a time, its input and output; then the states of the head."""
    c, batches = training.compute_bytes, training.batches
    h, q, kv, f = shape.hidden_size, shape.query_width, shape.key_value_width, shape.intermediate_size
    block = batches.held_out_tokens * c * (4 * h + 2 * q + 2 * kv + 3 * f + 7 * training.rank)
    states = batches.held_out_supervised * h * (2 * c + 8) + _panels(shape, training)
    return max(block, states)


def widened_bytes(shape: ModelShape, training: TrainingShape) -> int:
    """Room for a panel of the 16-bit head in the compute dtype, where that is wider; the loss head keeps it."""
    if training.compute_bytes == DENSE_BYTES:
        return 0
    head = DENSE_BYTES * shape.vocab_size * shape.hidden_size
    rows = PANEL_ROWS if head < LARGE_HEAD_BYTES else training.panel_bytes // (DENSE_BYTES * shape.hidden_size)
    return min(rows, shape.vocab_size) * shape.hidden_size * training.compute_bytes


def _panels(shape: ModelShape, training: TrainingShape) -> int:
    head = DENSE_BYTES * shape.vocab_size * shape.hidden_size
    return 2 * min(training.panel_bytes, head) if training.stream_ends else 0


def compiled_products(shape: ModelShape, rank: int) -> tuple[int, int]:
    """Different matrix products of a decoder block for one number of tokens: those of the forward pass, and those that
    the backward pass adds. Layers of the same widths, in buffers of the same width, share one.

    Each is named by what tells it apart: its widths, and how far apart the rows of its operands lie.
    """
    h, q, kv, f = shape.hidden_size, shape.query_width, shape.key_value_width, shape.intermediate_size
    together = ((h, (q, kv, kv)), (q, (h,)), (h, (f, f)), (f, (h,)))  # inputs, and outputs side by side
    forward: set[tuple[object, ...]] = set()
    backward: set[tuple[object, ...]] = set()
    for width, outputs in together:
        ranks, row = rank * len(outputs), sum(outputs)
        forward.add(("low rank", width, ranks))
        backward |= {("adapters", ranks, width, ranks, width), ("add", ranks, width, ranks, width)}
        for i, out in enumerate(outputs):
            forward |= {("base", width, out, row, len(outputs)), ("add", rank, out, ranks, row)}
            backward |= {("low rank back", out, row, ranks), ("adapters", rank, out, ranks, row)}
            backward.add(("base back", out, width, row, i > 0))
    return len(forward), len(backward - forward)


def compiled_bytes(shape: ModelShape, training: TrainingShape) -> int:
    """What libraries of matrix products keep: oneDNN the compiled ones of each number of tokens and of the head's
    chunks; the other, where products in fp32 go, its buffers.
    """
    if not training.on_cpu or training.compute_bytes != 2:
        return MATRIX_BUFFERS if training.on_cpu else 0
    forward, backward = compiled_products(shape, training.rank)
    batches = training.batches
    counts = batches.token_counts * (forward + backward) + batches.held_out_counts * forward
    head = 2 * min(1 + batches.token_counts, -(-batches.supervised // ROW_MULTIPLE))
    return PRODUCT_BYTES * min(MOST_PRODUCTS, counts + head)


def predict(shape: ModelShape, training: TrainingShape) -> dict[str, int]:
    """Bytes by component at the highest moment of a run, above what the process itself takes; they add up to the peak.

    Raises:
        AssertionError: more blocks resident than there are.
    """
    if training.full:
        return _predict_full(shape, training)
    c, layers = training.compute_bytes, shape.num_layers
    streamed = training.resident_blocks is not None
    resident = layers if training.resident_blocks is None else training.resident_blocks
    assert resident <= layers, (resident, layers)
    stored = (training.spec, training.mixed_bits, c)  # how a linear's weight is
    buffers = resident_bytes(shape, *stored, min(STREAM_BUFFERS, layers - resident)) if streamed else 0
    masters = training.adapter_parameters * MASTER_BYTES
    copies = 3 * c * training.adapter_parameters // 2 if training.path == "blocks" else 0
    optimizer = int(training.adapter_parameters * training.adam_bytes)
    always = {
        "base weights": resident_bytes(shape, *stored, resident),
        "weights not in four bits": c * shape.parts.matrix_elements,
        "blocks on their way": buffers,
        "embeddings, head, norms": dense_bytes(shape, c) - (end_bytes(shape, c) if training.stream_ends else 0),
        "adapters": masters + copies,
        "optimizer state": optimizer if training.page_bytes is None else 0,
        "pages of the optimizer": training.page_bytes or 0,
    }
    per_block = 0 if training.offload else kept_bytes(shape, training)
    inputs = 2 * input_bytes(shape, training) if training.offload else 0  # on their way to and from the file
    stay = training.on_cpu or training.micro_batches > 1  # from step to step, or from micro-batch to micro-batch
    gradients = masters if stay else 0  # before the step's last backward pass
    work = working_bytes(shape, training) + inputs
    always["room for logits"] = logits_bytes(shape, training)
    always["a panel of the head, widened"] = widened_bytes(shape, training)
    always["one dense weight"] = 0 if training.spec is None else c * shape.largest_linear
    heights = [
        {
            "adapter gradients": gradients,
            "kept by blocks": layers * per_block,
            "loss head": head_bytes(shape, training),
        },
        {
            "adapter gradients": max(gradients, masters // layers),
            "kept by blocks": layers * per_block,
            "one block at work": work,
        },
        {"adapter gradients": masters, "kept by blocks": per_block, "one block at work": work},
        {"adapter gradients": masters if training.on_cpu else 0, "an evaluation": held_out_bytes(shape, training)},
    ]
    highest = max(heights, key=lambda height: sum(height.values()))
    parts = always | highest
    parts["compiled products"] = compiled_bytes(shape, training)
    parts["gaps in the heap"] = _gaps(shape, training, highest) if training.on_cpu else 0
    parts["margin"] = max(LEAST_MARGIN, int(MARGIN * sum(parts.values()))) if training.on_cpu else 0
    return {name: num_bytes for name, num_bytes in parts.items() if num_bytes}


def _gaps(shape: ModelShape, training: TrainingShape, height: Mapping[str, int]) -> int:
    """Bytes of gaps in the C library's heap at a moment of these parts, once it no longer grows from step to step."""
    shares = GAPS_GENERIC if training.path == "generic" else GAPS_BF16 if training.compute_bytes == 2 else GAPS_FP32
    kept = height.get("kept by blocks", 0)
    gate_up = 2 * training.batches.tokens * training.compute_bytes * shape.intermediate_size
    if gate_up >= MAPPED_BYTES and training.keep == "everything":
        kept -= shape.num_layers * gate_up
    at_work = sum(height.get(name, 0) for name in ("one block at work", "loss head", "an evaluation"))
    at_work -= _panels(shape, training) if "loss head" in height else 0
    inputs = shape.num_layers * input_bytes(shape, training)
    return int(shares.inputs * inputs + shares.kept * max(0, kept) + shares.at_work * at_work)


def _predict_full(shape: ModelShape, training: TrainingShape) -> dict[str, int]:
    """Every weight trained in 16 bits, with gradients in 16 bits and Adam in 32."""
    weights = DENSE_BYTES * shape.parameters
    moments = {
        "kept by blocks": shape.num_layers * kept_bytes(shape, training),
        "one block at work": working_bytes(shape, training),
    }
    return {
        "base weights": weights,
        "weight gradients": weights,
        "optimizer state": (FULL_BYTES - 2 * DENSE_BYTES) * shape.parameters,
    } | moments


@dataclass(frozen=True)
class Work:
    """What a micro-batch has to compute and move.

    Args:
        flops: of the matrix products, attention included.
        weight_bytes: dense weights written by dequantisation, over all passes.
        read_bytes: of the streamed base and ends.
        block_passes: how often a block is entered, forward or backward.
    """

    flops: float
    weight_bytes: int
    read_bytes: int
    block_passes: int


def work_of(shape: ModelShape, training: TrainingShape) -> Work:
    """Products of one micro-batch: forward, recomputation, input gradients, adapters, attention, head.

    Attention is causal and within rows.
    """
    tokens, layers = training.batches.tokens, shape.num_layers
    forward = 2.0 * tokens * shape.multiplied_elements
    again = 0.0 if training.keep == "everything" else forward - 2.0 * tokens * shape.last_products
    attention = 2.0 * tokens * training.batches.longest_row * shape.query_width
    attention_passes = 3.5 + (1 if training.keep == "nothing" else 0)  # forward 1, backward 2.5
    adapters = 6.0 * tokens * training.adapter_parameters * (1 if training.keep == "everything" else 4 / 3)
    weights = forward * (3 if training.full else 2) + again
    blocks = weights + adapters + layers * attention * attention_passes
    head = 4.0 * training.batches.supervised * shape.vocab_size * shape.hidden_size
    passes = 2 + (0 if training.keep == "everything" else 1)
    dense = 0 if training.spec is None else training.compute_bytes * shape.parts.linear_elements * passes
    read = 0
    if training.resident_blocks is not None:
        stored = (training.spec, training.mixed_bits, training.compute_bytes)
        read += 2 * (base_bytes(shape, *stored) - resident_bytes(shape, *stored, training.resident_blocks))
    if training.stream_ends:
        chunk_rows = max(1, training.chunk_bytes // (shape.vocab_size * training.compute_bytes))
        chunks = -(-training.batches.supervised // chunk_rows)
        read += 2 * chunks * DENSE_BYTES * shape.vocab_size * shape.hidden_size
    return Work(blocks + head, dense, read, 2 * layers)
