"""What each part of a training run costs in bytes and in work: arithmetic only, nothing is loaded.

Symbols as in the QLoRA literature: T tokens in a micro-batch, h hidden width, L blocks, V vocabulary,
r rank, c bytes of the compute dtype, n elements of a weight, P adapter parameters.

A run's memory has several heights: the loss head on top of all that blocks keep, the backward pass of the last
block (everything is still kept) and of the first (every gradient exists), the optimizer's update, loading. `predict`
adds up each and returns the parts of the highest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nybble.errors import ConfigError, ModelError
from nybble.formats.quantized_tensor import LayerSpecs, QuantSpec

if TYPE_CHECKING:
    from nybble.layers.decoder_block import Keep

DENSE_BYTES = 2  # embeddings and head stay in 16 bits
MASTER_BYTES = 4  # fp32 adapters and their gradients
ADAM_BYTES = 8  # two fp32 moments
ADAM_8BIT_BYTES = 2 + 8 / 256  # two codes, two fp32 scales for each 256
FULL_BYTES = 12  # full fine-tuning in 16 bits, a parameter: weight 2, gradient 2, two fp32 moments
LSE_BYTES = 4  # fp32 log-sum-exp a head, and 1 / RMS
TOKEN_MULTIPLE = 64  # packed rows are filled up to it
STREAM_BUFFERS = 2  # blocks of a streamed base in memory besides the resident ones: at work, and the next
COMPILED_BYTES = 28_000_000  # products that oneDNN keeps compiled for one number of tokens, measured
SLACK = 0.30  # of what comes and goes in a step: gaps in the C library's heap, measured
MOST_SLACK = 200_000_000  # tensors from 32 MiB on are mapped by themselves and leave no gaps
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelShape:
    """The widths of a decoder that decide what it costs.

    Args:
        linears: (in_features, out_features) of each linear layer of one block, in the order of `LINEARS`.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    query_width: int
    key_value_width: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    linears: tuple[tuple[int, int], ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelShape":
        """From the fields of a config.json with Llama's names.

        Raises:
            ModelError: a field that the arithmetic needs is missing; the message names it.
        """
        hidden = _field(config, "hidden_size", "n_embd")
        heads = _field(config, "num_attention_heads", "n_head")
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or hidden // heads
        width = config.get("intermediate_size") or config.get("n_inner") or 4 * hidden
        q, kv = heads * head_dim, kv_heads * head_dim
        attention = ((hidden, q), (hidden, kv), (hidden, kv), (q, hidden))
        mlp = ((hidden, width), (hidden, width), (width, hidden))
        return cls(
            _field(config, "num_hidden_layers", "n_layer"),
            hidden,
            heads,
            q,
            kv,
            width,
            _field(config, "vocab_size"),
            bool(config.get("tie_word_embeddings", False)),
            attention + mlp,
        )

    @property
    def block_elements(self) -> int:
        """Weights of the linear layers of one block."""
        return sum(rows * columns for rows, columns in self.linears)

    @property
    def parameters(self) -> int:
        """All of the model's."""
        return self.num_layers * self.block_elements + dense_bytes(self) // DENSE_BYTES

    def adapter_parameters(self, rank: int, target_modules: str | Sequence[str]) -> int:
        """P: r · (in + out) of every adapted layer.

        Raises:
            ConfigError: a name is none of `LINEARS`.
        """
        wanted: Sequence[str] = LINEARS[:4] if target_modules == "attention" else target_modules
        if target_modules == "all-linear":
            wanted = LINEARS
        for name in wanted:
            if name.rpartition(".")[2] not in LINEARS:
                raise ConfigError(
                    f"target_modules names {name!r}, which the arithmetic does not know.",
                    f"Allowed: all-linear, attention, or names among {', '.join(LINEARS)}.",
                )
        leaves = {name.rpartition(".")[2] for name in wanted}
        sizes = [sum(linear) for name, linear in zip(LINEARS, self.linears, strict=True) if name in leaves]
        return self.num_layers * rank * sum(sizes)


def _field(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(config.get(name), int):
            return int(config[name])
    raise ModelError(
        f"The model's config has no whole number under {' or '.join(names)}.",
        "Memory is predicted from config.json alone, so the field is needed.",
    )


@dataclass(frozen=True)
class TrainingShape:
    """The choices of a run that decide what it costs.

    Args:
        tokens: T, in the largest micro-batch, padding included.
        supervised_tokens: of those, how many are projected by the head at most.
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
        page_bytes: None where optimizer state is resident, else what its largest pages take while they are updated.
        offload: what blocks keep goes to a file.
        token_counts: different numbers of tokens that micro-batches have on a CPU; 0 on other devices.
        full: every weight is trained; then rank and adapters are 0.
    """

    tokens: int
    supervised_tokens: int
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
    token_counts: int = 1
    full: bool = False


def block_bytes(shape: ModelShape, spec: QuantSpec | None, mixed_bits: float | None = None) -> int:
    """The linear layers of one block; where layers have several formats, of a mean one."""
    if spec is not None and mixed_bits is not None:
        return round(shape.block_elements * mixed_bits / 8)
    return sum(DENSE_BYTES * i * o if spec is None else spec.bytes(i * o) for i, o in shape.linears)


def mean_bits(shape: ModelShape, specs: LayerSpecs) -> float:
    """Bits a weight, scales included, of a base whose layers have several formats."""
    sizes = {name: i * o for name, (i, o) in zip(LINEARS, shape.linears, strict=True)}
    total = stored = 0
    for layer, spec in specs.items():
        numel = sizes.get(layer.rpartition(".")[2], shape.block_elements // len(LINEARS))
        total, stored = total + numel, stored + spec.bytes(numel)
    return 8 * stored / total


def base_bytes(shape: ModelShape, spec: QuantSpec | None, mixed_bits: float | None = None) -> int:
    """The linear layers of all blocks."""
    return shape.num_layers * block_bytes(shape, spec, mixed_bits)


def end_bytes(shape: ModelShape) -> int:
    """Embeddings and head."""
    return DENSE_BYTES * shape.vocab_size * shape.hidden_size * (1 if shape.tied else 2)


def dense_bytes(shape: ModelShape) -> int:
    """Embeddings, head and norms."""
    return end_bytes(shape) + DENSE_BYTES * (2 * shape.num_layers + 1) * shape.hidden_size


def input_bytes(shape: ModelShape, training: TrainingShape) -> int:
    """A block's input, which it keeps in any case."""
    return training.tokens * training.compute_bytes * shape.hidden_size


def kept_bytes(shape: ModelShape, training: TrainingShape) -> int:
    """What one block keeps between its forward and its backward pass."""
    c = training.compute_bytes
    h, q, kv, f = shape.hidden_size, shape.query_width, shape.key_value_width, shape.intermediate_size
    if training.keep == "nothing" or (training.path == "generic" and training.keep == "attention"):
        per_token = c * h
    elif training.path == "generic":
        return working_bytes(shape, training)
    elif training.keep == "attention":
        per_token = c * (h + q) + LSE_BYTES * shape.num_heads
    else:
        per_token = c * (2 * h + 2 * q + 2 * kv + 2 * f + 7 * training.rank) + LSE_BYTES * (shape.num_heads + 2)
    return training.tokens * per_token


def working_bytes(shape: ModelShape, training: TrainingShape) -> int:
    """What one block holds at the height of its backward pass besides what it kept.

    Decoder blocks: at SwiGLU's backward the gradients of output and of the MLP's input to down_proj, SwiGLU's
    output; where it was recomputed also x2, q/k/v, attention's output, gate and up, the low-rank products.
    Generic path, per token: fp32 copies inside the two norms (input and normalised), then in the compute
    dtype the inputs of every product and of every elementwise function.
    """
    c, r = training.compute_bytes, training.rank
    h, q, kv, f = shape.hidden_size, shape.query_width, shape.key_value_width, shape.intermediate_size
    if training.path == "blocks":
        at_work = h + 2 * f  # gradients of y and of SwiGLU's output, that output
        recomputed = h + q + 2 * kv + 2 * f + 7 * r  # x2, q/k/v, gate and up
        attended = q  # attention's output
        made = {"nothing": recomputed + attended, "attention": recomputed, "everything": 0}[training.keep]
        return training.tokens * c * (at_work + made)
    norms = 2 * (4 * h + 4 * h)
    attention = 2 * h + 3 * q + 2 * kv + 2 * q  # norm output and residual, q/k rotated, k/v widened to q heads, output
    mlp = 2 * h + 4 * f
    return training.tokens * (norms + c * (attention + mlp + 14 * r))


def head_bytes(shape: ModelShape, training: TrainingShape) -> int:
    """Height of the loss head: a chunk of logits, the states around it, a panel of a large or streamed head.

    States, for each supervised token: gathered, normed, their gradients chunk by chunk and joined; the last norm
    keeps fp32 copies of its input and of what it normalised.
    """
    c = training.compute_bytes
    rows = min(training.supervised_tokens, max(TOKEN_MULTIPLE, training.chunk_bytes // (shape.vocab_size * c)))
    states = training.supervised_tokens * shape.hidden_size * (4 * c + 12)
    panel = 0
    if training.stream_ends:
        panel = 2 * min(training.panel_bytes, DENSE_BYTES * shape.vocab_size * shape.hidden_size)
    return rows * shape.vocab_size * c + states + panel


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
    buffers = (
        min(STREAM_BUFFERS, layers - resident) * block_bytes(shape, training.spec, training.mixed_bits)
        if streamed
        else 0
    )
    masters = training.adapter_parameters * MASTER_BYTES
    copies = 3 * c * training.adapter_parameters // 2 if training.path == "blocks" else 0
    optimizer = int(training.adapter_parameters * training.adam_bytes)
    always = {
        "base weights": resident * block_bytes(shape, training.spec, training.mixed_bits),
        "blocks on their way": buffers,
        "embeddings, head, norms": dense_bytes(shape) - (end_bytes(shape) if training.stream_ends else 0),
        "adapters": masters + copies,
        "optimizer state": optimizer if training.page_bytes is None else 0,
    }
    per_block = 0 if training.offload else kept_bytes(shape, training)
    inputs = 2 * input_bytes(shape, training) if training.offload else 0  # on their way to and from the file
    gradients = masters if training.micro_batches > 1 else 0  # before the step's last backward pass
    work = working_bytes(shape, training) + inputs
    dense = 0 if training.spec is None else c * max(i * o for i, o in shape.linears)
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
        {"adapter gradients": masters, "pages of the optimizer": training.page_bytes or 0},
    ]
    for height in heights:
        height["one dense weight"] = dense
    highest = max(heights, key=lambda height: sum(height.values()))
    parts = always | highest
    if training.token_counts:
        parts["compiled products"] = training.token_counts * COMPILED_BYTES
        parts["gaps in the heap"] = min(MOST_SLACK, int(SLACK * (sum(highest.values()) - dense)))
    return {name: num_bytes for name, num_bytes in parts.items() if num_bytes}


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


def work_of(shape: ModelShape, training: TrainingShape, document_tokens: int) -> Work:
    """Products of one micro-batch: forward, recomputation, input gradients, adapters, attention, head.

    Args:
        document_tokens: of a row; attention is causal and within rows.
    """
    tokens, layers = training.tokens, shape.num_layers
    down = shape.linears[6][0] * shape.linears[6][1]
    forward = 2.0 * tokens * shape.block_elements
    again = 0.0 if training.keep == "everything" else forward - 2.0 * tokens * down
    attention = 2.0 * tokens * document_tokens * shape.query_width
    attention_passes = 3.5 + (1 if training.keep == "nothing" else 0)  # forward 1, backward 2.5
    adapters = 6.0 * tokens * training.adapter_parameters / layers * (1 if training.keep == "everything" else 4 / 3)
    weights = forward * (3 if training.full else 2) + again
    blocks = layers * (weights + adapters + attention * attention_passes)
    head = 4.0 * training.supervised_tokens * shape.vocab_size * shape.hidden_size
    passes = 2 + (0 if training.keep == "everything" else 1)
    dense = 0 if training.spec is None else training.compute_bytes * layers * shape.block_elements * passes
    read = 0
    if training.resident_blocks is not None:
        read += 2 * (layers - training.resident_blocks) * block_bytes(shape, training.spec, training.mixed_bits)
    if training.stream_ends:
        chunk_rows = max(1, training.chunk_bytes // (shape.vocab_size * training.compute_bytes))
        chunks = -(-training.supervised_tokens // chunk_rows)
        read += 2 * chunks * DENSE_BYTES * shape.vocab_size * shape.hidden_size
    return Work(blocks + head, dense, read, 2 * layers)
