"""The next token of a few texts: all decoder layers and the head on up to MAX_ROWS rows.

    decode    model -> what takes steps through it

What does not change from token to token is handed over once, so this is no torch op: a body is a class whose instances
keep a model the way they read it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels import registry

NO_ROPE = -1  # a layer's `rope` and `query_rope`, where it has no rotary angles
MAX_ROWS = 8  # up to which multiplying packed weights beats dequantising them first; kRowsAtOnce of csrc/gemv.h


# ---- what a model is made of ---------------------------------------------------------------------


@dataclass(frozen=True)
class DecoderLinear:
    """A frozen linear layer and its adapter.

    Args:
        weight: `(out, in)`, in four bits or dense.
        bias: `(out)` or None.
        a, b: of the adapter, `(r, in)` with the scaling in it and `(out, r)`; None without one.
    """

    weight: QuantizedTensor | Tensor
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None


@dataclass(frozen=True)
class DecoderNorm:
    """An RMSNorm, or a LayerNorm: its weight, what is added to the mean square, and its bias, if there is one. Of heads
    the weight may be `(heads, head_dim)`, a row for each.

    Args:
        centred: LayerNorm.
    """

    weight: Tensor
    eps: float
    bias: Tensor | None = None
    centred: bool = False


@dataclass(frozen=True)
class DecoderInput:
    """What a layer adds at its end: norm(project(activation(gate(x)) * e)), e its own input of each token.

    Args:
        gate, project: from rows to the input's width and back.
        norm: of what is added.
    """

    gate: Sequence[DecoderLinear]
    project: Sequence[DecoderLinear]
    norm: DecoderNorm


@dataclass(frozen=True)
class DecoderLayer:
    """A decoder layer; each projection is the linears that read the same rows.

    Args:
        input_norm, mlp_norm: of what attention and the MLP read, or None.
        q_norm, k_norm: of each head, of all heads of a row where they are so wide, or None.
        window: columns that a token attends to, its own included; 0 for all.
        attention_output_norm, mlp_output_norm: of what is added to the rows, or None.
        activation: "silu", "gelu_pytorch_tanh" or "gelu_new", which is the same.
        softcap: c in c · tanh(scores / c); 0 for none.
        rope, query_rope: which of a step's rotary angles its keys and its queries have, or NO_ROPE.
        neighbours: elements 2 i and 2 i + 1 of a head are turned together, else i and i + half of what is turned.
        residual: factor on what is added to the rows.
        gated: the activation is that of a gate.
        parallel: the MLP reads the rows that attention does.
        v_norm: of each head of values, or None.
        reads_keys: the layer before it whose keys and values it reads, in whose part of the cache; None where it has
            its own. Then `qkv` gives queries alone.
        values_are_keys: what `qkv` gives are queries and keys, and these before their norm are the values.
        own_input: what it makes of an input of its own, or None.
        factor: on its result.
    """

    qkv: Sequence[DecoderLinear]
    o: Sequence[DecoderLinear]
    gate_up: Sequence[DecoderLinear]
    down: Sequence[DecoderLinear]
    input_norm: DecoderNorm | None
    mlp_norm: DecoderNorm | None
    q_norm: DecoderNorm | None
    k_norm: DecoderNorm | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int
    scale: float
    attention_output_norm: DecoderNorm | None = None
    mlp_output_norm: DecoderNorm | None = None
    activation: str = "silu"
    softcap: float = 0.0
    rope: int = 0
    query_rope: int = 0
    neighbours: bool = False
    residual: float = 1.0
    gated: bool = True
    parallel: bool = False
    v_norm: DecoderNorm | None = None
    reads_keys: int | None = None
    values_are_keys: bool = False
    own_input: DecoderInput | None = None
    factor: float = 1.0

    @property
    def projections(self) -> tuple[Sequence[DecoderLinear], ...]:
        own = () if self.own_input is None else (self.own_input.gate, self.own_input.project)
        return self.qkv, self.o, self.gate_up, self.down, *own


@dataclass(frozen=True)
class DecoderModel:
    """A causal language model of such layers.

    Args:
        layers: from the first to the last.
        norm, head: what comes after them.
        dtype: of keys and values, and of four-bit products where the device multiplies it.
    """

    layers: Sequence[DecoderLayer]
    norm: DecoderNorm
    head: DecoderLinear
    dtype: torch.dtype

    def linears(self) -> list[DecoderLinear]:
        return [*(linear for layer in self.layers for each in layer.projections for linear in each), self.head]


class Decoder(Protocol):
    """A model that is ready for steps; what the body of `decode` for it gives."""

    def step(
        self,
        x: Tensor,
        cos: Sequence[Tensor],
        sin: Sequence[Tensor],
        cache: Sequence[Tensor],
        texts: Tensor,
        columns: Tensor,
        starts: Tensor,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """Through all layers; keys and values of the rows are written into the cache.

        Args:
            x: `(rows, hidden)`, embeddings of up to MAX_ROWS tokens.
            cos, sin: of each kind of layers, fp32 `(rows, rotary_dim / 2)`; a layer's `rope` says which is its own.
            cache: of each layer, `(2, texts, kv_heads, capacity, head_dim)`, keys before values; finite, also where
                nothing has been written. That of a layer that reads another's is the other's.
            inputs: `(rows, layers, width)`, the layers' own, where they have any.
            texts, columns, starts: int64 `(rows)`: each token's text, its column in the cache, and the first
                column of its text. A token attends to its text's columns up to its own.

        Returns:
            Logits, fp32 `(rows, vocabulary)`.
        """

    def logits(self, x: Tensor) -> Tensor:
        """Only the last norm and the head: `(rows, hidden)`, up to MAX_ROWS of them, to fp32 `(rows, vocabulary)`."""


def decoder(model: DecoderModel) -> Decoder:
    """`model`, made ready by the backend that takes steps through it on its device.

    Raises:
        KernelError: the backend asked for cannot run.
    """
    device_type = model.norm.weight.device.type
    make: Callable[[DecoderModel], Decoder] = registry.body("decode", device_type, args=(model,))
    return make(model)
