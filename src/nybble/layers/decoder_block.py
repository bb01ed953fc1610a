"""One decoder layer, forward and backward, over transformers' own modules.

    x2 = x  + o(attention(rope(qkv(rms_norm(x)))))
    y  = x2 + down(silu(gate) * up),   gate, up = gate_up(rms_norm(x2))

So it is for Llama; what other families have beside that or lack (norms of heads, of what is added to x, of what is
read; LayerNorm; norms whose weights lie around zero; a factor on what is added; an MLP that reads x beside attention;
GeGLU, GELU without a gate; a soft cap on the scores; layers without rotary angles; keys and values of another layer;
inputs of their own) their `Family` says. The stages of a layer are methods, which training, answers and calibration
share.

Autograd through transformers' layer keeps some twenty tensors of a layer's width and casts most of them to
fp32 and back. Written out by hand, a layer keeps what its caller asks for:

    "nothing"     the input; backward recomputes all but down_proj's base product, which only a norm after it needs
    "attention"   also attention's output and log-sum-exp: no second pass of attention, and no o_proj product
                  is spared, since x2 comes from it (where the MLP reads x, it always is)
    "everything"  also what the products gave: backward recomputes only norms and the gate

What a layer reads beside the states is kept in any case.

The frozen weights are fetched (dequantised) where a product needs them, again in backward, so that they may
come from anywhere. Adapters sit in the same LoraLinear modules as on the generic path; A of layers that share
an input are stacked into one product. With no gradient wanted for x (nothing below is trained) its products
are skipped.

Source of the formulas: LoRA (arXiv 2106.09685), RMSNorm (arXiv 1910.07467), RoPE (arXiv 2104.09864),
SwiGLU and GeGLU (arXiv 2002.05202), LayerNorm (arXiv 1607.06450), FlashAttention-2's backward (arXiv 2307.08691).
Mixtures of experts in the MLP's place: `layers/mixture_block.py`.
Left out: dropout; such models run on the generic path.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nybble.families.family import Activation, Family
from nybble.kernels import registry
from nybble.kernels.ops.attention import attention_backward, attention_forward
from nybble.kernels.ops.glu import geglu, geglu_backward, gelu, gelu_backward, swiglu, swiglu_backward
from nybble.kernels.ops.rope import rope_, rope_backward_
from nybble.kernels.slabs import copy_of, empty_like
from nybble.layers.added import Added, add_projection, scaled
from nybble.layers.augmented import projection_on
from nybble.layers.layer_input import Beside, Entered, LayerInput
from nybble.layers.lora import LoraLinear
from nybble.layers.norms import Norm, Normed, norm_over, through_norm
from nybble.layers.packed_rows import QUERIES, Angles, PackedSequences
from nybble.layers.projection import DenseWeights, Projection

Keep = Literal["nothing", "attention", "everything"]

ACTIVATIONS: Mapping[tuple[Activation, bool], tuple[Callable[..., Tensor], Callable[..., Any]]] = {  # with a gate?
    ("silu", True): (swiglu, swiglu_backward),
    ("gelu_pytorch_tanh", True): (geglu, geglu_backward),
    ("gelu_pytorch_tanh", False): (gelu, gelu_backward),
    ("gelu_new", False): (gelu, gelu_backward),
}


def block_ops(family: Family) -> tuple[str, ...]:
    """The ops that a family's blocks are made of."""
    activation = ACTIVATIONS[family.activation, family.gated][0].__name__
    return (
        "dequantize_4bit_out",
        f"{family.norm}_norm_out",
        f"{family.norm}_norm_backward_out",
        "rope_",
        "packed_attention",
        "packed_attention_backward",
        f"{activation}_out",
        f"{activation}_backward_out",
    )


class DecoderBlock:
    """The forward and backward of one transformers decoder layer; it owns no parameters.

    Args:
        layer: a decoder layer of the family, its linears quantised and adapted or not.
        config: the text model's.
        weights: where the dense weights come from, shared by all blocks.
    """

    def __init__(self, layer: Any, family: Family, config: Any, weights: DenseWeights):
        own_class = projection_on(next(layer.parameters()).device.type)

        def projection(*names: str) -> Projection:
            return own_class([layer.get_submodule(name) for name in names], weights)

        def norm(name: str | None) -> Norm | None:
            return None if name is None else norm_over(layer.get_submodule(name), family, config)

        index = layer.self_attn.layer_idx
        self.index, self.reads_keys = index, family.reads_keys(config, index)
        self.gives_keys, self.values_are_keys = family.gives_keys(config, index), family.values_are_keys(config, index)
        family = family.of_layer(config, index)

        self.qkv, self.o = projection(*family.qkv), projection(family.o)
        self.weights = weights
        self._take_mlp(layer, family, projection)
        self.input_norm, self.mlp_norm = norm(family.input_norm), norm(family.mlp_norm)
        self.attention_output_norm = norm(family.attention_output_norm)
        self.mlp_output_norm = norm(family.mlp_output_norm)
        self.heads_together = family.heads_together
        self.activation, self.gated = family.activation, family.gated
        self.parallel, self.residual = family.parallel, family.residual_factor(config)
        self.kind = family.kinds(config)[index]
        self.query_kind = QUERIES if family.growing_queries else self.kind
        self.rotated, self.neighbours = family.rotated(config, index), family.rope_neighbours
        self.window, self.softcap = family.window(config, self.kind), family.softcap(config)
        self.scale = layer.self_attn.scaling
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = self.num_heads // layer.self_attn.num_key_value_groups
        computed = (2 - self.values_are_keys) * self.num_kv_heads * (not self.reads_keys)  # heads beside the queries
        self.head_dim = self.qkv.out_features // (self.num_heads + computed)
        ones = self._a_norm.weight.new_ones(self.head_dim)
        self.head_norms = [norm_over(layer.get_submodule(name), family, config, ones) for name in family.head_norms]
        self.layer_input: LayerInput | None = None
        if family.layer_input:
            gate, project, added = family.layer_input
            functions = ACTIVATIONS[family.activation, True]
            own_norm = norm_over(layer.get_submodule(added), family, config)
            self.layer_input = LayerInput(projection(gate), projection(project), own_norm, *functions)
        self.factor = 1.0 if family.layer_factor is None else float(getattr(layer, family.layer_factor))

    def _take_mlp(self, layer: Any, family: Family, projection: Callable[..., Projection]) -> None:
        """The linear layers of the layer's MLP."""
        self.gate_up, self.down = projection(*family.gate_up), projection(family.down)

    def __call__(self, x: Tensor, rows: PackedSequences, keep: Keep, beside: Beside | None = None) -> Tensor:
        """(T, hidden) -> (T, hidden).

        Args:
            beside: what it reads, and leaves to later layers, beside the states.
        """
        beside = beside or Beside()
        given = beside.input_of(self.index)
        y, keys_values = _BlockFunction.apply(x, given, self.reads(beside), self, rows, keep, *self.parameters())
        if self.gives_keys:
            beside.keys_values[self.kind] = keys_values
        return y

    @property
    def dtype(self) -> torch.dtype:
        """Of the states."""
        return self._a_norm.weight.dtype

    @property
    def _a_norm(self) -> Norm:
        norm = self.input_norm or self.attention_output_norm
        assert norm is not None
        return norm

    @property
    def projections(self) -> tuple[Projection, ...]:
        own = () if self.layer_input is None else (self.layer_input.gate, self.layer_input.project)
        return self.qkv, self.o, self.gate_up, self.down, *own

    def parameters(self) -> list[Tensor]:
        """The adapters' parameters, in the order in which `backward` returns their gradients."""
        return [p for projection in self.projections for p in projection.parameters()]

    @property
    def adapters(self) -> list[LoraLinear]:
        return [adapter for projection in self.projections for adapter in projection.adapters if adapter]

    def refresh_adapters(self, dtype: torch.dtype) -> None:
        """Bring the copies of the block's adapters up to date."""
        for projection in self.projections:
            projection.refresh_adapters(dtype)

    def attention_waits(self, like: Tensor) -> bool:
        """Whether its kernel for states like these asks the device for values, and waits.

        Args:
            like: has their dtype and device.
        """
        heads = self._split_heads(like.new_empty(1, self.attended_width))
        borders = torch.zeros(2, dtype=torch.int32, device=like.device)
        return registry.waits(
            "packed_attention", like.device, (*heads, borders, 1, self.scale, self.window, self.softcap)
        )

    # ---- the stages of forward -------------------------------------------------------------------

    def attention_input(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What q, k and v are made of, (T, hidden) in rows for `qkv`, and what its norm's backward needs of each row of
        the block's input, where there is one.
        """
        return _normed_for(self.qkv, self.input_norm, x)

    @property
    def attended_width(self) -> int:
        """Of queries, keys and values together."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def queries_keys_values(self, normed: Tensor, angles: Angles, read: Tensor | None = None) -> "Heads":
        """Attention's operands.

        Args:
            read: keys and values of another layer, (T, 2 kv), where it reads these.
        """
        z = self.qkv.low_rank(normed)
        qkv = self.qkv.forward(normed, z)
        if read is not None:
            qkv = _beside(qkv[:, : self.qkv.out_features], read)
        elif self.values_are_keys:
            keys = slice(self.num_heads * self.head_dim, self.qkv.out_features)
            qkv = _beside(qkv[:, : keys.stop], qkv[:, keys])
        normed_heads = self._norm_heads(qkv)
        if self.rotated:
            for part, kind in self._rotated(qkv):
                rope_(part, *angles[kind], self.neighbours)
        return Heads(z, qkv, normed_heads)

    def attend(self, qkv: Tensor, rows: PackedSequences) -> tuple[Tensor, Tensor]:
        """Attention: (T, q + 2 kv) -> output (T, q) and log-sum-exp (heads, documents' tokens)."""
        q, k, v = self._split_heads(qkv if rows.spread is None else rows.spread.to_documents(qkv))
        out, lse = attention_forward(
            q, k, v, rows.cu_seqlens, rows.max_length, scale=self.scale, window=self.window, softcap=self.softcap
        )
        out = out.flatten(1)
        return (out if rows.spread is None else rows.spread.to_rows(out)), lse

    def attention_output(self, out: Tensor, x: Tensor) -> tuple[Tensor, "Added"]:
        """The states after attention: its output (T, q), and what came into the block, to (T, hidden)."""
        return add_projection(self.o, self.attention_output_norm, self.residual, out, x)

    def mlp_reads(self, x: Tensor, x2: Tensor) -> Tensor:
        """Of what came into the block and the states after attention, those that the MLP reads."""
        return x if self.parallel else x2

    def attention_added(self, out: Tensor, x: Tensor) -> "Added":
        """What `attention_output` leaves for backward, without the product where nothing after it needs it."""
        if self.attention_output_norm is None:
            return Added(self.o.low_rank(out), self.residual)
        return self.attention_output(out, x)[1]

    def mlp_input(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """What gate and up are made of, as `attention_input`, from what `mlp_reads` says."""
        return _normed_for(self.gate_up, self.mlp_norm, states)

    def gate(self, normed: Tensor) -> tuple[Tensor, "Gated"]:
        """What down_proj reads, (T, f) in rows for it."""
        z = self.gate_up.low_rank(normed)
        gated = Gated(z, self.gate_up.forward(normed, z))
        act = empty_like(normed, (normed.shape[0], self.down.in_width))
        activate, _ = ACTIVATIONS[self.activation, self.gated]
        activate(*self.gate_and_up(gated), out=act[:, : self.down.in_features])
        return act, gated

    def gate_and_up(self, gated: "Gated") -> tuple[Tensor, ...]:
        """Each (T, f); one of them without a gate."""
        return gated.gate_up[:, : self.gate_up.out_features].chunk(1 + self.gated, dim=1)

    def mlp(self, normed: Tensor, x2: Tensor, *, result: bool, kept: bool) -> tuple[Any, Tensor | None]:
        """From what `mlp_input` gave and the states after attention, both (T, hidden): what the MLP's backward reads,
        and the block's result (T, hidden), or None where `result` is False.

        Args:
            kept: what backward reads is kept until then.
        """
        act, gated = self.gate(normed)
        if not result:
            return Mlp(gated, self.mlp_added(act, x2)), None
        y, added = self.mlp_output(act, x2)
        return Mlp(gated, added), y

    def mlp_output(self, act: Tensor, x2: Tensor) -> tuple[Tensor, "Added"]:
        """The block's result: what `gate` gave (T, f), and the states after attention, to (T, hidden)."""
        return add_projection(self.down, self.mlp_output_norm, self.residual, act, x2)

    def mlp_added(self, act: Tensor, x2: Tensor) -> "Added":
        """What `mlp_output` leaves for backward, without the product where nothing after it needs it."""
        if self.mlp_output_norm is None:
            return Added(self.down.low_rank(act), self.residual)
        return self.mlp_output(act, x2)[1]

    def reads(self, beside: Beside) -> Tensor | None:
        """Keys and values of another layer, (T, 2 kv), where it has none of its own."""
        return beside.keys_values[self.kind] if self.reads_keys else None

    def keys_values(self, qkv: Tensor) -> Tensor | None:
        """Of attention's operands, what later layers read, (T, 2 kv); None where none does."""
        operands = qkv[:, self.num_heads * self.head_dim : self.attended_width]
        return copy_of(operands) if self.gives_keys else None

    def leave(self, beside: Beside, qkv: Tensor) -> None:
        """Outside of training: put there what later layers read."""
        if (keys_values := self.keys_values(qkv)) is not None:
            beside.keys_values[self.kind] = keys_values

    def own_input_added(self, x: Tensor, beside: Beside) -> Tensor:
        """The states after the MLP with what comes of the layer's own input, where it has one."""
        given = beside.input_of(self.index)
        if self.layer_input is None or given is None:
            return x
        return self.layer_input.forward(x, given)[0]

    def finished(self, y: Tensor) -> Tensor:
        """The layer's result of what its last stage gave, in place."""
        return y if self.factor == 1.0 else y.mul_(self.factor)

    def by_head(self, qkv: Tensor) -> Tensor:
        heads = qkv[:, : self.attended_width]
        return heads.view(qkv.shape[0], -1, self.head_dim)  # (T, heads + 2 kv heads, head_dim)

    def _rotated(self, qkv: Tensor) -> list[tuple[Tensor, str]]:
        """Heads that are turned, and the kind of their angles."""
        if self.reads_keys:  # they are turned already
            return [(self.by_head(qkv)[:, : self.num_heads], self.kind)]
        if self.query_kind == self.kind:
            return [(self.by_head(qkv)[:, : self.num_heads + self.num_kv_heads], self.kind)]
        queries, keys, _ = self._split_heads(qkv)
        return [(queries, self.query_kind), (keys, self.kind)]

    def _split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.by_head(qkv).split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return q, k, v

    def _norm_heads(self, qkv: Tensor) -> list[Normed]:
        """Norms queries, keys and values in place, where the family does."""
        kept = []
        for heads, norm in zip(self._normed_heads(qkv), self.head_norms, strict=False):
            before = copy_of(heads)
            _, stats = norm.forward(before, out=heads)
            kept.append(Normed(norm, before, stats))
        return kept

    def _normed_heads(self, qkv: Tensor) -> list[Tensor]:
        """Queries, keys and values in the rows that their norms see: heads (T, heads, head_dim), or all of a token."""
        return [part.view(len(qkv), -1) if self.heads_together else part for part in self._split_heads(qkv)]

    # ---- backward --------------------------------------------------------------------------------

    def backward_mlp(self, grad_y: Tensor, mlp: Any, states: Tensor) -> tuple[Tensor, list[Tensor]]:
        """From the gradient of the block's result, (T, hidden), to that of what `mlp_input` gave, and those of the
        adapters of the MLP.

        Args:
            mlp: what `mlp` gave, here a `Mlp`; its gate and up are overwritten.
            states: that `mlp_input` was given.
        """
        grad_down = mlp.added.backward(self.down.gradient(grad_y))
        grad_z = self.down.backward_low_rank(grad_down)
        grad_act = self.down.backward_input(grad_down, grad_z)
        y = self.gate_up.for_magnitudes(mlp.gated.gate_up)
        activated = self.gate_and_up(mlp.gated)
        _, activate_backward = ACTIVATIONS[self.activation, self.gated]
        act = grad_act  # gate_up now holds its own gradient, and this what down_proj read
        activate_backward(grad_act, *activated, *activated, act)
        del grad_act
        down = self.down.backward_adapters(grad_down, grad_z, act, mlp.added.z)
        del act, grad_down

        grad_gate_up = mlp.gated.gate_up
        grad_z = self.gate_up.backward_low_rank(grad_gate_up)
        gate_up = self.gate_up.backward_adapters(grad_gate_up, grad_z, self.mlp_input(states)[0], mlp.gated.z, y)
        del y
        return self.gate_up.backward_input(grad_gate_up, grad_z), [*gate_up, *down]

    def backward_attend(
        self,
        grad_out: Tensor,
        heads: "Heads",
        out: Tensor,
        lse: Tensor,
        rows: PackedSequences,
        grad_given: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """From the gradient of attention's output, (T, q), and that of the keys and values that others read, to that of
        what qkv gave, (T, q + 2 kv), and of the keys and values that it read.
        """
        grad_qkv, qkv = empty_like(heads.qkv), heads.qkv
        seen = grad_qkv  # by the documents' tokens
        if rows.spread is not None:
            qkv, out = rows.spread.to_documents(qkv), rows.spread.to_documents(out)
            seen = empty_like(qkv)
            grad_out = empty_like(out).zero_().index_copy_(0, rows.spread.first, grad_out)
        q, k, v = self._split_heads(qkv)
        attention_backward(
            grad_out.view(q.shape), q, k, v, out.view(q.shape), lse, rows.cu_seqlens, rows.max_length,
            scale=self.scale, window=self.window, softcap=self.softcap, grads=self._split_heads(seen),
        )  # fmt: skip
        if rows.spread is not None:
            rows.spread.gradient(seen, out=grad_qkv)
        queries = self.num_heads * self.head_dim
        if grad_given is not None:
            grad_qkv[:, queries : self.attended_width] += grad_given
        if self.rotated:
            for part, kind in self._rotated(grad_qkv):
                rope_backward_(part, *rows.angles[kind], self.neighbours)
        for grad, normed in zip(self._normed_heads(grad_qkv), heads.normed, strict=False):
            normed.backward(grad, out=grad)
        if self.reads_keys:
            return grad_qkv[:, :queries], grad_qkv[:, queries : self.attended_width]
        if self.values_are_keys:
            keys, values = grad_qkv[:, queries : self.qkv.out_features], grad_qkv[:, self.qkv.out_features :]
            keys += values
            return grad_qkv[:, : self.qkv.out_features], None
        return grad_qkv, None


def _beside(left: Tensor, right: Tensor) -> Tensor:
    """(T, a) and (T, b) -> (T, a + b)."""
    both = empty_like(left, (left.shape[0], left.shape[1] + right.shape[1]))
    return torch.cat([left, right], dim=1, out=both)


def _normed_for(projection: Projection, norm: Norm | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The normed rows as the projection reads them, and what the norm's backward needs; x where there is no norm."""
    if norm is None:
        return x, None
    rows = empty_like(x, (x.shape[0], projection.in_width))
    return rows, norm.forward(x, out=rows[:, : projection.in_features])[1]


@dataclass
class Heads:
    """What `DecoderBlock.queries_keys_values` computes."""

    z: Tensor | None  # (T, Σ ranks)
    qkv: Tensor  # (T, q + 2 kv), as wide as `DecoderBlock.qkv` writes it, normed and rotated
    normed: list[Normed]  # queries and keys, where they are


@dataclass
class Gated:
    """What `DecoderBlock.gate` leaves for backward."""

    z: Tensor | None  # (T, Σ ranks)
    gate_up: Tensor  # (T, 2 f), as wide as `DecoderBlock.gate_up` writes it


@dataclass
class Mlp:
    """What an MLP leaves for backward."""

    gated: Gated
    added: Added


@dataclass
class Intermediates:
    """Everything a block's backward reads besides its input."""

    stats: Tensor | None  # of the input's norm
    heads: Heads
    attention_out: Tensor  # (T, q)
    lse: Tensor  # (heads, T)
    attention_added: Added
    mlp_states: Tensor  # (T, hidden), what the MLP reads
    mlp_stats: Tensor | None  # of its norm
    mlp: Any  # what the block's `mlp` says
    entered: Entered | None  # of the layer's own input


def _compute(
    block: DecoderBlock,
    x: Tensor,
    given: Tensor | None,
    read: Tensor | None,
    rows: PackedSequences,
    attended: tuple[Tensor, Tensor] | None,
    *,
    result: bool,
    kept: bool,
) -> tuple[Intermediates, Tensor | None]:
    """The block, and its result (T, hidden); with `result` False what its backward reads alone.

    Args:
        given, read: the layer's own input, and keys and values of another, where it has these.
        attended: attention's output and log-sum-exp when they were kept.
        kept: what backward reads is kept until then.
    """
    normed, stats = block.attention_input(x)
    heads = block.queries_keys_values(normed, rows.angles, read)
    del normed
    out, lse = attended or block.attend(heads.qkv, rows)
    if block.parallel and not result:
        x2, attention_added = x, block.attention_added(out, x)
    else:
        x2, attention_added = block.attention_output(out, x)
    states = block.mlp_reads(x, x2)
    normed, mlp_stats = block.mlp_input(states)
    mlp, y = block.mlp(normed, x2, result=result or block.layer_input is not None, kept=kept)
    entered = None
    if block.layer_input is not None and y is not None and given is not None:
        y, entered = block.layer_input.forward(y, given)
    parts = Intermediates(stats, heads, out, lse, attention_added, states, mlp_stats, mlp, entered)
    return parts, block.finished(y) if result and y is not None else None


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        given: Tensor | None,
        read: Tensor | None,
        block: DecoderBlock,
        rows: PackedSequences,
        keep: Keep,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        parts, y = _compute(block, x, given, read, rows, None, result=True, kept=keep == "everything")
        assert y is not None
        ctx.block, ctx.rows = block, rows
        ctx.kept = parts if keep == "everything" else None
        ctx.save_for_backward(x, given, read, *((parts.attention_out, parts.lse) if keep == "attention" else ()))
        ctx.set_materialize_grads(False)
        return y, block.keys_values(parts.heads.qkv)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        block, rows = ctx.block, ctx.rows
        x, given, read, *kept_attention = ctx.saved_tensors
        hidden = x.shape[1]
        if ctx.kept is None:
            s, _ = _compute(block, x, given, read, rows, tuple(kept_attention) or None, result=False, kept=False)
        else:
            s, ctx.kept = ctx.kept, None
        grad_y = scaled(grad_outputs[0], block.factor)
        grad_given, own = None, []
        if block.layer_input is not None:
            grad_y, grad_given, own = block.layer_input.backward(grad_y, s.entered, given)

        grad_normed, mlp = block.backward_mlp(grad_y, s.mlp, s.mlp_states)
        grad_x2 = empty_like(grad_y, (grad_y.shape[0], block.o.out_width))
        grad_x2[:, :hidden] = grad_y
        through_norm(block.mlp_norm, grad_normed, s.mlp_states, s.mlp_stats, out=grad_x2[:, :hidden])
        del grad_normed

        grad_o = s.attention_added.backward(grad_y if block.parallel else grad_x2)
        grad_z = block.o.backward_low_rank(grad_o)
        o = block.o.backward_adapters(grad_o, grad_z, s.attention_out, s.attention_added.z)
        grad_out = block.o.backward_input(grad_o, grad_z)
        del grad_o
        grad_qkv, grad_read = block.backward_attend(
            grad_out, s.heads, s.attention_out, s.lse, rows, grad_outputs[1] if block.gives_keys else None
        )
        del grad_out

        grad_z = block.qkv.backward_low_rank(grad_qkv)
        qkv = block.qkv.backward_adapters(grad_qkv, grad_z, block.attention_input(x)[0], s.heads.z)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_normed = block.qkv.backward_input(grad_qkv, grad_z)
            grad_x = through_norm(block.input_norm, grad_normed, x, s.stats, out=grad_x2[:, :hidden])
        return grad_x, grad_given, grad_read, None, None, None, *qkv, *o, *mlp, *own
