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
LSE_BYTES = 4  # fp32 log-sum-exp a head, and 1 / RMS


@dataclass(frozen=True)
class ModelShape:
    """The widths of a decoder that decide what it costs.

    Args:
        linears: (in_features, out_features) of each linear layer of one block.
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
    """

    tokens: int
    supervised_tokens: int
    adapter_parameters: int
    rank: int
    compute_bytes: int
    spec: QuantSpec | None
    path: str
    keep: str
    chunk_bytes: int
    mixed_bits: float | None = None


def base_bytes(shape: ModelShape, spec: QuantSpec | None, mixed_bits: float | None = None) -> int:
    """The linear layers of all blocks."""
    sizes = [rows * columns for rows, columns in shape.linears]
    if mixed_bits is not None:
        return round(shape.num_layers * sum(sizes) * mixed_bits / 8)
    per_block = sum(DENSE_BYTES * n if spec is None else spec.bytes(n) for n in sizes)
    return shape.num_layers * per_block


def dense_bytes(shape: ModelShape) -> int:
    """Embeddings, head and norms."""
    ends = shape.vocab_size * shape.hidden_size * (1 if shape.tied else 2)
    return DENSE_BYTES * (ends + (2 * shape.num_layers + 1) * shape.hidden_size)


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
    """What one block holds at the height of its backward pass, its input and output gradient included.

    Decoder blocks: x, x2, two gradients of their width, q/k/v, attention's output, gate and up (which their
    gradients overwrite), one more of the MLP's width, the low-rank products.
    Generic path, per token: fp32 copies inside the two norms (input and normalised), then in the compute
    dtype the inputs of every product and of every elementwise function.
    """
    c, r = training.compute_bytes, training.rank
    h, q, kv, f = shape.hidden_size, shape.query_width, shape.key_value_width, shape.intermediate_size
    if training.path == "blocks":
        return training.tokens * c * (4 * h + 2 * q + 2 * kv + 3 * f + 7 * r)
    norms = 2 * (4 * h + 4 * h)
    attention = 2 * h + 3 * q + 2 * kv + 2 * q  # norm output and residual, q/k rotated, k/v widened to q heads, output
    mlp = 2 * h + 4 * f
    return training.tokens * (norms + c * (attention + mlp + 14 * r))


def predict(shape: ModelShape, training: TrainingShape) -> dict[str, int]:
    """Bytes by component, and their peak under "peak".

    The peak is the larger of two moments: the head's backward pass on top of all block inputs, and the
    backward pass of one block.
    """
    c = training.compute_bytes
    adapters = training.adapter_parameters * MASTER_BYTES
    logits = training.supervised_tokens * shape.vocab_size * c
    parts = {
        "base weights": base_bytes(shape, training.spec, training.mixed_bits),
        "embeddings, head, norms": dense_bytes(shape),
        "adapters": adapters + (3 * c * training.adapter_parameters // 2 if training.path == "blocks" else 0),
        "adapter gradients": adapters,
        "optimizer state": training.adapter_parameters * ADAM_BYTES,
        "kept by blocks": shape.num_layers * kept_bytes(shape, training),
        "one block at work": working_bytes(shape, training),
        "one dense weight": 0 if training.spec is None else c * max(i * o for i, o in shape.linears),
        "loss head": min(logits, training.chunk_bytes) + 2 * training.supervised_tokens * shape.hidden_size * c,
    }
    always = sum(parts[name] for name in list(parts)[:6])
    parts["peak"] = always + max(parts["one block at work"] + parts["one dense weight"], parts["loss head"])
    return parts
