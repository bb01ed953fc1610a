"""What each part of a training run costs in bytes: arithmetic only, nothing is loaded.

Symbols as in the QLoRA literature: T tokens in a micro-batch, h hidden width, L blocks, V vocabulary,
r rank, c bytes of the compute dtype, n elements of a weight, P adapter parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nybble.errors import ModelError
from nybble.formats.quantized_tensor import QuantSpec

DENSE_BYTES = 2  # embeddings and head stay in 16 bits
MASTER_BYTES = 4  # fp32 adapters and their gradients
ADAM_BYTES = 8  # two fp32 moments
LOGIT_BYTES = 8  # fp32 logits and their softmax, beside the product's own c


@dataclass(frozen=True)
class ModelShape:
    """The widths of a decoder that decide what it costs.

    Args:
        linears: (in_features, out_features) of each linear layer of one block.
    """

    num_layers: int
    hidden_size: int
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
            q,
            kv,
            width,
            _field(config, "vocab_size"),
            bool(config.get("tie_word_embeddings", False)),
            attention + mlp,
        )


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
        spec: four-bit format of the base, or None for 16 bits.
        checkpointing: whether blocks keep only their input.
        chunk_bytes: what one chunk of logits may take.
    """

    tokens: int
    supervised_tokens: int
    adapter_parameters: int
    rank: int
    compute_bytes: int
    spec: QuantSpec | None
    checkpointing: bool
    chunk_bytes: int


def base_bytes(shape: ModelShape, spec: QuantSpec | None) -> int:
    """The linear layers of all blocks."""
    sizes = (rows * columns for rows, columns in shape.linears)
    per_block = sum(DENSE_BYTES * n if spec is None else spec.bytes(n) for n in sizes)
    return shape.num_layers * per_block


def dense_bytes(shape: ModelShape) -> int:
    """Embeddings, head and norms."""
    ends = shape.vocab_size * shape.hidden_size * (1 if shape.tied else 2)
    return DENSE_BYTES * (ends + (2 * shape.num_layers + 1) * shape.hidden_size)


def block_bytes(shape: ModelShape, training: TrainingShape) -> int:
    """What one block's forward pass holds for its backward pass through transformers' modules.

    Per token: fp32 copies inside the two norms (they compute in fp32: input, normalised), then in the
    compute dtype the inputs of every product and of every elementwise function.
    """
    h, q, kv, f = shape.hidden_size, shape.query_width, shape.key_value_width, shape.intermediate_size
    norms = 2 * (4 * h + 4 * h)
    attention = 2 * h + 3 * q + 2 * kv + 2 * q  # norm output and residual, q/k rotated, k/v widened to q heads, output
    mlp = 2 * h + 4 * f
    low_rank = 14 * training.rank
    return training.tokens * (norms + training.compute_bytes * (attention + mlp + low_rank))


def predict(shape: ModelShape, training: TrainingShape) -> dict[str, int]:
    """Bytes by component, and their peak under "peak".

    The peak is the larger of two moments: the head's backward pass on top of all block inputs, and the
    backward pass of one block.
    """
    c, tokens = training.compute_bytes, training.tokens
    adapters = training.adapter_parameters * MASTER_BYTES
    block = block_bytes(shape, training)
    logits = training.supervised_tokens * shape.vocab_size * (c + LOGIT_BYTES)
    parts = {
        "base weights": base_bytes(shape, training.spec),
        "embeddings, head, norms": dense_bytes(shape),
        "adapters": adapters,
        "adapter gradients": adapters,
        "optimizer state": training.adapter_parameters * ADAM_BYTES,
        "block inputs": shape.num_layers * tokens * shape.hidden_size * c,
        "one block's activations": block if training.checkpointing else shape.num_layers * block,
        "one dense weight": 0 if training.spec is None else c * max(i * o for i, o in shape.linears),
        "loss head": min(logits, training.chunk_bytes) + 2 * tokens * shape.hidden_size * c,
    }
    if not training.checkpointing:
        parts["block inputs"] = 0
    fixed = sum(parts[name] for name in list(parts)[:5])
    in_block = parts["one block's activations"] + parts["one dense weight"]
    in_head = parts["loss head"] + (0 if training.checkpointing else parts["one block's activations"])
    parts["peak"] = fixed + parts["block inputs"] + max(in_block, in_head)
    return parts
