"""One decoder layer, forward and backward, over transformers' own modules.

    x2 = x  + o(attention(rope(qkv(rms_norm(x)))))
    y  = x2 + down(silu(gate) * up),   gate, up = gate_up(rms_norm(x2))

So it is for Llama; what other families have beside that (norms of heads and of what is added to x, norms whose weights
lie around zero, GeGLU, a soft cap on the scores) their `Family` says. The stages of a layer are methods, which
training, answers and calibration share.

Autograd through transformers' layer keeps some twenty tensors of a layer's width and casts most of them to
fp32 and back. Written out by hand, a layer keeps what its caller asks for:

    "nothing"     the input; backward recomputes all but down_proj's base product, which only a norm after it needs
    "attention"   also attention's output and log-sum-exp: no second pass of attention, and no o_proj product
                  is spared, since x2 comes from it
    "everything"  also what the products gave: backward recomputes only norms and the gate

The frozen weights are fetched (dequantised) where a product needs them, again in backward, so that they may
come from anywhere. Adapters sit in the same LoraLinear modules as on the generic path; A of layers that share
an input are stacked into one product. With no gradient wanted for x (nothing below is trained) its products
are skipped.

Source of the formulas: LoRA (arXiv 2106.09685), RMSNorm (arXiv 1910.07467), RoPE (arXiv 2104.09864),
SwiGLU and GeGLU (arXiv 2002.05202), FlashAttention-2's backward (arXiv 2307.08691). Left out: dropout, mixture of
experts and layer-scale; such models run on the generic path.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from nybble.families import FAMILIES
from nybble.families.family import Activation, Family
from nybble.kernels.ops.attention import attention_backward, attention_forward
from nybble.kernels.ops.four_bit import dequantize_into
from nybble.kernels.ops.glu import geglu, geglu_backward, swiglu, swiglu_backward
from nybble.kernels.ops.norm import rms_norm, rms_norm_backward
from nybble.kernels.ops.rope import rope_, rope_backward_
from nybble.layers.dense import weight_matrix
from nybble.layers.lora import LoraLinear, linear_features
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.layers.streamed import BlockStore, StreamedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Keep = Literal["nothing", "attention", "everything"]

Angles = Mapping[str, tuple[Tensor, Tensor]]  # kind of layer -> cos and sin, each fp32 (T, rotary_dim / 2)

GATES: Mapping[Activation, tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]] = {
    "silu": (swiglu, swiglu_backward),
    "gelu_pytorch_tanh": (geglu, geglu_backward),
}


def block_ops(family: Family) -> tuple[str, ...]:
    """The ops that a family's blocks are made of."""
    gate = GATES[family.activation][0].__name__
    return (
        "dequantize_4bit_out",
        "rms_norm_out",
        "rms_norm_backward_out",
        "rope_",
        "packed_attention",
        "packed_attention_backward",
        f"{gate}_out",
        f"{gate}_backward_out",
    )


@dataclass(frozen=True)
class PackedSequences:
    """Where the T tokens of a packed batch lie, the same for every block.

    Args:
        angles: of each token's position, for each kind of layer.
        cu_seqlens: int32 `(num_documents + 1)`, the documents' borders.
        max_length: tokens of the longest document.
    """

    angles: Angles
    cu_seqlens: Tensor
    max_length: int


def rotary_angles(model: "PreTrainedModel", position_ids: Tensor) -> Angles:
    """cos and sin of the model's own RoPE variants, each fp32 `(B * T, rotary_dim / 2)`, for positions `(B, T)`.

    In fp32 whatever the compute dtype: bf16 positions lose whole tokens beyond 256.
    """
    config = model.config.get_text_config()
    family = FAMILIES[config.model_type]
    kinds = sorted(set(family.kinds(config)))
    if family.rope_by_kind:
        return {kind: _angles(model, position_ids, kind) for kind in kinds}
    return dict.fromkeys(kinds, _angles(model, position_ids))


def _angles(model: "PreTrainedModel", position_ids: Tensor, *kind: str) -> tuple[Tensor, Tensor]:
    cos, sin = model.base_model.rotary_emb(torch.empty(0, device=position_ids.device), position_ids, *kind)
    half = cos.shape[-1] // 2  # transformers repeats each angle for the two elements it turns
    return cos[..., :half].flatten(0, 1).contiguous(), sin[..., :half].flatten(0, 1).contiguous()


class DenseWeights:
    """Dequantises frozen weights into one kept buffer: a fresh one per product costs more than the arithmetic.

    A weight is valid until the next is fetched.

    Args:
        store: of a streamed base's blocks.
    """

    def __init__(self, store: BlockStore | None = None) -> None:
        self.store = store
        self._buffer = torch.empty(0)

    def begin(self, *, will_return: bool) -> None:
        """A forward pass starts at the first block; `will_return`: its backward pass follows."""
        if self.store is not None:
            self.store.begin(will_return=will_return)

    def fetch(self, linear: Any, dtype: torch.dtype) -> Tensor:
        """The weight of a frozen linear, `[out, in]` in `dtype`."""
        if isinstance(linear, StreamedLinear):
            assert self.store is not None, f"{linear.name} is streamed, and there is no block store"
            quantized = self.store.fetch(linear.name)
        elif isinstance(linear, QuantizedLinear):
            quantized = linear.quantized()
        else:
            return weight_matrix(linear).to(dtype)
        numel = linear.in_features * linear.out_features
        if self._buffer.dtype != dtype or self._buffer.numel() < numel:
            self._buffer = torch.empty(numel, dtype=dtype, device=quantized.packed.device)
        weight = self._buffer[:numel].view(linear.out_features, linear.in_features)
        dequantize_into(quantized, weight)
        return weight


class Projection:
    """Linear layers that read the same input, written side by side into one output.

    Args:
        modules: LoraLinear, QuantizedLinear or dense linears; output columns in this order.
        weights: where the dense weights come from.
    """

    def __init__(self, modules: Sequence[nn.Module], weights: DenseWeights):
        self.weights = weights
        self.linears: list[Any] = [module.base if isinstance(module, LoraLinear) else module for module in modules]
        self.adapters = [module if isinstance(module, LoraLinear) else None for module in modules]
        widths = [linear_features(linear)[1] for linear in self.linears]
        ranks = [adapter.rank if adapter else 0 for adapter in self.adapters]
        self.in_features, self.out_features = linear_features(self.linears[0])[0], sum(widths)
        self.columns = _slices(widths)
        self.ranks = _slices(ranks)
        self._copies: AdapterCopies | None = None

    def parameters(self) -> list[Tensor]:
        """A and B of each adapter, in order: what `backward_adapters` returns gradients of."""
        return [p for adapter in self.adapters if adapter for p in (adapter.lora_A, adapter.lora_B)]

    def refresh_adapters(self, dtype: torch.dtype) -> None:
        """Bring the adapters' copies up to date, where there are any that are used."""
        if any(adapter and adapter.enabled for adapter in self.adapters):
            self._adapter_copies(dtype)

    def low_rank(self, x: Tensor) -> Tensor | None:
        """z = x · [A₁; A₂; ..]ᵀ, (T, in) -> (T, Σ ranks); None without adapters, or where they are switched off."""
        enabled = {adapter.enabled for adapter in self.adapters if adapter}
        assert len(enabled) <= 1, "adapters are switched on and off together"
        return x @ self._adapter_copies(x.dtype).a.T if True in enabled else None

    def forward(self, x: Tensor, z: Tensor | None, residual: Tensor | None = None) -> Tensor:
        """y = residual + x · Wᵀ + bias + scaling · z · Bᵀ, (T, in) -> (T, out)."""
        y = x.new_empty(x.shape[0], self.out_features) if residual is None else residual.clone()
        for i, (linear, adapter, columns, ranks) in enumerate(self._parts()):
            part = y[:, columns]
            weight = self.weights.fetch(linear, x.dtype)
            if residual is None:
                torch.mm(x, weight.T, out=part)
            else:
                part.addmm_(x, weight.T)
            if linear.bias is not None:
                part += linear.bias.to(x.dtype)
            if adapter is not None and z is not None:
                part.addmm_(z[:, ranks], self._adapter_copies(x.dtype).b_transposed[i])
        return y

    def backward_low_rank(self, grad_y: Tensor) -> Tensor | None:
        """The gradient of z, (T, out) -> (T, Σ ranks); None without adapters."""
        if not any(self.adapters):
            return None
        grad_z = grad_y.new_empty(grad_y.shape[0], self.ranks[-1].stop)
        for i, (_, adapter, columns, ranks) in enumerate(self._parts()):
            if adapter is not None:
                torch.mm(grad_y[:, columns], self._adapter_copies(grad_y.dtype).b[i], out=grad_z[:, ranks])
        return grad_z

    def backward_input(self, grad_y: Tensor, grad_z: Tensor | None) -> Tensor:
        """The gradient of x, (T, out) -> (T, in)."""
        grad_x = grad_y.new_empty(grad_y.shape[0], self.in_features)
        for i, (linear, _, columns, _) in enumerate(self._parts()):
            weight = self.weights.fetch(linear, grad_y.dtype)
            if i == 0:
                torch.mm(grad_y[:, columns], weight, out=grad_x)
            else:
                grad_x.addmm_(grad_y[:, columns], weight)
        if grad_z is not None:
            grad_x.addmm_(grad_z, self._adapter_copies(grad_y.dtype).a)
        return grad_x

    def backward_adapters(self, grad_y: Tensor, grad_z: Tensor | None, x: Tensor, z: Tensor | None) -> list[Tensor]:
        """The gradients of A and B of each adapter, in the order of `parameters`, fp32."""
        if grad_z is None or z is None:
            return []
        grad_a = (grad_z.T @ x).float()  # (Σ r, in)
        grads = []
        for _, adapter, columns, ranks in self._parts():
            if adapter is not None:
                # zᵀ · grad_y, then turned: oneDNN takes the other order at half the speed.
                grad_b = (z[:, ranks].T @ grad_y[:, columns]).float().mul_(adapter.scaling)  # (r, out)
                grads += [grad_a[ranks], grad_b.T.contiguous()]
        return grads

    def _parts(self) -> list[tuple[Any, LoraLinear | None, slice, slice]]:
        return list(zip(self.linears, self.adapters, self.columns, self.ranks, strict=True))

    def _adapter_copies(self, dtype: torch.dtype) -> "AdapterCopies":
        """The adapters in `dtype`, made anew when an optimizer step has changed the masters."""
        versions = (dtype, *(parameter._version for parameter in self.parameters()))
        if self._copies is None or self._copies.a.dtype != dtype:
            self._copies = AdapterCopies(self.adapters, dtype)
        if self._copies.versions != versions:
            self._copies.refresh(self.adapters, versions)
        return self._copies


class AdapterCopies:
    """The adapters of a projection as its products want them, in the compute dtype; memory that is written anew.

    a: `(Σ ranks, in)`, stacked. b: scaling · B, `(out, r)`, of each layer that has an adapter, by its place.
    b_transposed: the same, `(r, out)` and contiguous, which oneDNN adds twice as fast.
    versions: dtype, and how often each fp32 master had been written to when it was copied.
    """

    def __init__(self, adapters: Sequence[LoraLinear | None], dtype: torch.dtype):
        adapted = {i: adapter for i, adapter in enumerate(adapters) if adapter}
        first = next(iter(adapted.values())).lora_A
        ranks = sum(adapter.rank for adapter in adapted.values())
        self.versions: tuple[object, ...] = ()
        self.a = torch.empty(ranks, first.shape[1], dtype=dtype, device=first.device)
        self.b = {i: torch.empty_like(adapter.lora_B, dtype=dtype) for i, adapter in adapted.items()}
        self.b_transposed = {i: b.new_empty(b.shape[::-1]) for i, b in self.b.items()}

    @torch.no_grad()
    def refresh(self, adapters: Sequence[LoraLinear | None], versions: tuple[object, ...]) -> None:
        """Copy the masters as they are now."""
        row = 0
        for i, b in self.b.items():
            adapter = adapters[i]
            assert adapter is not None
            self.a[row : row + adapter.rank].copy_(adapter.lora_A)
            torch.mul(adapter.lora_B, adapter.scaling, out=b)
            self.b_transposed[i].copy_(b.T)
            row += adapter.rank
        self.versions = versions


def _slices(widths: Sequence[int]) -> list[slice]:
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    return [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]


@dataclass(frozen=True)
class Norm:
    """RMSNorm over a module's weight.

    Args:
        offset: added to the weight.
    """

    module: Any
    eps: float
    offset: float

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.module.weight
        return weight.detach()

    def forward(self, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The normed rows and 1 / RMS of each."""
        return rms_norm(x, self.weight, self.eps, self.offset, out=out)

    def backward(
        self, grad: Tensor, x: Tensor, rstd: Tensor, out: Tensor | None = None, accumulate: bool = False
    ) -> Tensor:
        return rms_norm_backward(grad, x, self.weight, rstd, self.offset, out=out, accumulate=accumulate)


class DecoderBlock:
    """The forward and backward of one transformers decoder layer; it owns no parameters.

    Args:
        layer: a decoder layer of the family, its linears quantised and adapted or not.
        config: the text model's.
        weights: where the dense weights come from, shared by all blocks.
    """

    def __init__(self, layer: Any, family: Family, config: Any, weights: DenseWeights):
        def projection(*names: str) -> Projection:
            return Projection([layer.get_submodule(name) for name in names], weights)

        def norm(name: str) -> Norm:
            return Norm(layer.get_submodule(name), config.rms_norm_eps, family.norm_offset)

        self.qkv, self.o = projection(*family.qkv), projection(family.o)
        self.gate_up, self.down = projection(*family.gate_up), projection(family.down)
        self.input_norm, self.mlp_norm = norm(family.input_norm), norm(family.mlp_norm)
        self.attention_output_norm = norm(family.attention_output_norm) if family.attention_output_norm else None
        self.mlp_output_norm = norm(family.mlp_output_norm) if family.mlp_output_norm else None
        self.head_norms = [norm(name) for name in family.head_norms]
        self.activation = family.activation
        self.kind = family.kinds(config)[layer.self_attn.layer_idx]
        self.window, self.softcap = family.window(config, self.kind), family.softcap(config)
        self.scale = layer.self_attn.scaling
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        q_width, k_width = self.qkv.columns[0].stop, self.qkv.columns[1].stop - self.qkv.columns[0].stop
        self.num_heads, self.num_kv_heads = q_width // self.head_dim, k_width // self.head_dim

    def __call__(self, x: Tensor, rows: PackedSequences, keep: Keep) -> Tensor:
        """(T, hidden) -> (T, hidden)."""
        return _BlockFunction.apply(x, self, rows, keep, *self.parameters())

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    def parameters(self) -> list[Tensor]:
        """The adapters' parameters, in the order in which `backward` returns their gradients."""
        return [p for projection in self.projections for p in projection.parameters()]

    def refresh_adapters(self, dtype: torch.dtype) -> None:
        """Bring the copies of the block's adapters up to date."""
        for projection in self.projections:
            projection.refresh_adapters(dtype)

    # ---- the stages of forward -------------------------------------------------------------------

    def attention_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What q, k and v are made of, (T, hidden), and 1 / RMS of the block's input."""
        return self.input_norm.forward(x)

    def queries_keys_values(self, normed: Tensor, angles: Angles) -> "Heads":
        """Attention's operands."""
        z = self.qkv.low_rank(normed)
        qkv = self.qkv.forward(normed, z)
        normed_heads = self._norm_heads(qkv)
        rope_(self._rotated(qkv), *angles[self.kind])
        return Heads(z, qkv, normed_heads)

    def attend(self, qkv: Tensor, rows: PackedSequences) -> tuple[Tensor, Tensor]:
        """Attention: (T, q + 2 kv) -> output (T, q) and log-sum-exp (heads, T)."""
        q, k, v = self._split_heads(qkv)
        out, lse = attention_forward(
            q, k, v, rows.cu_seqlens, rows.max_length, scale=self.scale, window=self.window, softcap=self.softcap
        )
        return out.flatten(1), lse

    def attention_output(self, out: Tensor, x: Tensor) -> tuple[Tensor, "Added"]:
        """The states after attention: its output (T, q), and what came into the block, to (T, hidden)."""
        return _add(self.o, self.attention_output_norm, out, x)

    def mlp_input(self, x2: Tensor) -> tuple[Tensor, Tensor]:
        """What gate and up are made of, (T, hidden), and 1 / RMS of the states after attention."""
        return self.mlp_norm.forward(x2)

    def gate(self, normed: Tensor) -> tuple[Tensor, "Gated"]:
        """What down_proj reads, (T, f)."""
        z = self.gate_up.low_rank(normed)
        gate_up = self.gate_up.forward(normed, z)
        activate, _ = GATES[self.activation]
        return activate(*gate_up.chunk(2, dim=1)), Gated(z, gate_up)

    def mlp_output(self, act: Tensor, x2: Tensor) -> tuple[Tensor, "Added"]:
        """The block's result: what `gate` gave (T, f), and the states after attention, to (T, hidden)."""
        return _add(self.down, self.mlp_output_norm, act, x2)

    def mlp_added(self, act: Tensor, x2: Tensor) -> "Added":
        """What `mlp_output` leaves for backward, without the product where nothing after it needs it."""
        return Added(self.down.low_rank(act)) if self.mlp_output_norm is None else self.mlp_output(act, x2)[1]

    def by_head(self, qkv: Tensor) -> Tensor:
        return qkv.view(qkv.shape[0], -1, self.head_dim)  # (T, heads + 2 kv heads, head_dim)

    def _rotated(self, qkv: Tensor) -> Tensor:
        return self.by_head(qkv)[:, : self.num_heads + self.num_kv_heads]

    def _split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.by_head(qkv).split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return q, k, v

    def _norm_heads(self, qkv: Tensor) -> list["Normed"]:
        """Norms queries and keys in place, each head by itself, where the family does."""
        kept = []
        for heads, norm in zip(self._split_heads(qkv), self.head_norms, strict=False):
            before = heads.clone(memory_format=torch.contiguous_format)
            _, rstd = norm.forward(before, out=heads)
            kept.append(Normed(norm, before, rstd))
        return kept

    # ---- backward --------------------------------------------------------------------------------

    def backward_attend(
        self, grad_out: Tensor, heads: "Heads", out: Tensor, lse: Tensor, rows: PackedSequences
    ) -> Tensor:
        """From the gradient of attention's output, (T, q), to that of what qkv gave, (T, q + 2 kv)."""
        grad_qkv = torch.empty_like(heads.qkv)
        grads = self._split_heads(grad_qkv)
        q, k, v = self._split_heads(heads.qkv)
        attention_backward(
            grad_out.view(q.shape), q, k, v, out.view(q.shape), lse, rows.cu_seqlens, rows.max_length,
            scale=self.scale, window=self.window, softcap=self.softcap, grads=grads,
        )  # fmt: skip
        rope_backward_(self._rotated(grad_qkv), *rows.angles[self.kind])
        for grad, normed in zip(grads, heads.normed, strict=False):
            normed.backward(grad, out=grad)
        return grad_qkv


def decoder_block(layer: Any, config: Any, weights: DenseWeights) -> DecoderBlock:
    """The decoder block over one layer of a model with this config, as the layer's linears are now."""
    config = config.get_text_config()
    return DecoderBlock(layer, FAMILIES[config.model_type], config, weights)


def _add(projection: Projection, norm: Norm | None, inputs: Tensor, x: Tensor) -> tuple[Tensor, "Added"]:
    """x + norm(projection(inputs))"""
    z = projection.low_rank(inputs)
    if norm is None:
        return projection.forward(inputs, z, residual=x), Added(z)
    before = projection.forward(inputs, z)
    normed, rstd = norm.forward(before)
    return normed.add_(x), Added(z, Normed(norm, before, rstd))


@dataclass
class Normed:
    """What the backward of a norm needs."""

    norm: Norm
    before: Tensor  # (T, width) or (T, heads, head_dim)
    rstd: Tensor  # (T) or (T, heads)

    def backward(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        return self.norm.backward(grad, self.before, self.rstd, out=out)


@dataclass
class Heads:
    """What `DecoderBlock.queries_keys_values` computes."""

    z: Tensor | None  # (T, Σ ranks)
    qkv: Tensor  # (T, q + 2 kv), normed and rotated
    normed: list[Normed]  # queries and keys, where they are


@dataclass
class Gated:
    """What `DecoderBlock.gate` leaves for backward."""

    z: Tensor | None  # (T, Σ ranks)
    gate_up: Tensor  # (T, 2 f)


@dataclass
class Added:
    """What a projection back into the states leaves for backward."""

    z: Tensor | None  # (T, r)
    normed: Normed | None = None  # its result, where that is normed

    def backward(self, grad: Tensor) -> Tensor:
        """From the gradient of the states to that of the projection's result."""
        return grad if self.normed is None else self.normed.backward(grad)


@dataclass
class Intermediates:
    """Everything a block's backward reads besides its input."""

    rstd: Tensor  # (T), of the input's norm
    heads: Heads
    attention_out: Tensor  # (T, q)
    lse: Tensor  # (heads, T)
    attention_added: Added
    x2: Tensor  # (T, hidden)
    rstd2: Tensor  # (T), of its norm
    gated: Gated
    mlp_added: Added


def _compute(
    block: DecoderBlock, x: Tensor, rows: PackedSequences, kept: tuple[Tensor, Tensor] | None, *, result: bool
) -> tuple[Intermediates, Tensor]:
    """The block, and its result (T, hidden); or with `result` False what down_proj reads, (T, f).

    Args:
        kept: attention's output and log-sum-exp when they were kept.
    """
    normed, rstd = block.attention_input(x)
    heads = block.queries_keys_values(normed, rows.angles)
    del normed
    out, lse = kept or block.attend(heads.qkv, rows)
    x2, attention_added = block.attention_output(out, x)
    normed, rstd2 = block.mlp_input(x2)
    act, gated = block.gate(normed)
    last, mlp_added = block.mlp_output(act, x2) if result else (act, block.mlp_added(act, x2))
    return Intermediates(rstd, heads, out, lse, attention_added, x2, rstd2, gated, mlp_added), last


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, block: DecoderBlock, rows: PackedSequences, keep: Keep, *parameters: Tensor
    ) -> Tensor:
        parts, y = _compute(block, x, rows, None, result=True)
        ctx.block, ctx.rows = block, rows
        ctx.kept = parts if keep == "everything" else None
        ctx.save_for_backward(x, *((parts.attention_out, parts.lse) if keep == "attention" else ()))
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        block, rows = ctx.block, ctx.rows
        x, *kept_attention = ctx.saved_tensors
        grad_y = grad_outputs[0].contiguous()
        if ctx.kept is None:
            s, act = _compute(block, x, rows, tuple(kept_attention) or None, result=False)
        else:
            s, act, ctx.kept = ctx.kept, None, None

        grad_down = s.mlp_added.backward(grad_y)
        grad_z = block.down.backward_low_rank(grad_down)
        grad_act = block.down.backward_input(grad_down, grad_z)
        gate, up = s.gated.gate_up.chunk(2, dim=1)
        _, activate_backward = GATES[block.activation]
        if act is None:
            act = torch.empty_like(grad_act)
            activate_backward(grad_act, gate, up, gate, up, act)  # gate_up now holds its own gradient
        else:
            activate_backward(grad_act, gate, up, gate, up)
        del grad_act
        down = block.down.backward_adapters(grad_down, grad_z, act, s.mlp_added.z)
        del act, grad_down

        grad_gate_up = s.gated.gate_up
        grad_z = block.gate_up.backward_low_rank(grad_gate_up)
        gate_up = block.gate_up.backward_adapters(grad_gate_up, grad_z, block.mlp_input(s.x2)[0], s.gated.z)
        grad_normed = block.gate_up.backward_input(grad_gate_up, grad_z)
        grad_x2 = block.mlp_norm.backward(grad_normed, s.x2, s.rstd2, out=grad_y.clone(), accumulate=True)

        grad_o = s.attention_added.backward(grad_x2)
        grad_z = block.o.backward_low_rank(grad_o)
        o = block.o.backward_adapters(grad_o, grad_z, s.attention_out, s.attention_added.z)
        grad_out = block.o.backward_input(grad_o, grad_z)
        del grad_o
        grad_qkv = block.backward_attend(grad_out, s.heads, s.attention_out, s.lse, rows)

        grad_z = block.qkv.backward_low_rank(grad_qkv)
        qkv = block.qkv.backward_adapters(grad_qkv, grad_z, block.attention_input(x)[0], s.heads.z)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_normed = block.qkv.backward_input(grad_qkv, grad_z)
            grad_x = block.input_norm.backward(grad_normed, x, s.rstd, out=grad_x2, accumulate=True)
        return grad_x, None, None, None, *qkv, *o, *gate_up, *down
