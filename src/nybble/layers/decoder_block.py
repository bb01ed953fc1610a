"""One decoder layer of the Llama family, forward and backward, over transformers' own modules.

    x2 = x  + o(attention(rope(qkv(rms_norm(x)))))
    y  = x2 + down(silu(gate) * up),   gate, up = gate_up(rms_norm(x2))

Autograd through transformers' layer keeps some twenty tensors of a layer's width and casts most of them to
fp32 and back. Written out by hand, a layer keeps what its caller asks for:

    "nothing"     the input; backward recomputes all but down_proj's base product, whose result it never needs
    "attention"   also attention's output and log-sum-exp: no second pass of attention, and no o_proj product
                  is spared, since x2 comes from it
    "everything"  also what the products gave: backward recomputes only norms and SwiGLU

The frozen weights are fetched (dequantised) where a product needs them, again in backward, so that they may
come from anywhere. Adapters sit in the same LoraLinear modules as on the generic path; A of layers that share
an input are stacked into one product. With no gradient wanted for x (nothing below is trained) its products
are skipped.

Source of the formulas: LoRA (arXiv 2106.09685), RMSNorm (arXiv 1910.07467), RoPE (arXiv 2104.09864),
SwiGLU (arXiv 2002.05202), FlashAttention-2's backward (arXiv 2307.08691). Left out: dropout, mixture of
experts, layer-scale and post-norms; such models run on the generic path.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from nybble.kernels.ops.attention import attention_backward, attention_forward
from nybble.kernels.ops.four_bit import dequantize_into
from nybble.kernels.ops.glu import swiglu, swiglu_backward
from nybble.kernels.ops.norm import rms_norm, rms_norm_backward
from nybble.kernels.ops.rope import rope_, rope_backward_
from nybble.layers.dense import weight_matrix
from nybble.layers.lora import LoraLinear, linear_features
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.layers.streamed import BlockStore, StreamedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Keep = Literal["nothing", "attention", "everything"]

BLOCK_OPS = (
    "dequantize_4bit_out",
    "rms_norm_out",
    "rms_norm_backward_out",
    "rope_",
    "packed_attention",
    "packed_attention_backward",
    "swiglu_out",
    "swiglu_backward_out",
)


@dataclass(frozen=True)
class PackedSequences:
    """Where the T tokens of a packed batch lie, the same for every block.

    Args:
        cos, sin: fp32 `(T, rotary_dim / 2)`, of each token's position.
        cu_seqlens: int32 `(num_documents + 1)`, the documents' borders.
    """

    cos: Tensor
    sin: Tensor
    cu_seqlens: Tensor


def rotary_angles(model: "PreTrainedModel", position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the model's own RoPE variant, each fp32 `(B * T, rotary_dim / 2)`, for positions `(B, T)`.

    In fp32 whatever the compute dtype: bf16 positions lose whole tokens beyond 256.
    """
    cos, sin = model.base_model.rotary_emb(torch.empty(0, device=position_ids.device), position_ids)
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
        enabled = any(adapter and adapter.enabled for adapter in self.adapters)
        return x @ self._adapter_copies(x.dtype).a.T if enabled else None

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


class DecoderBlock:
    """The forward and backward of one transformers decoder layer; it owns no parameters.

    Args:
        layer: a Llama, Mistral, Qwen2 or Qwen3 decoder layer, its linears quantised and adapted or not.
        head_dim: width of an attention head.
        window: tokens a token attends to, itself included; 0 for all before it.
        weights: where the dense weights come from, shared by all blocks.
    """

    def __init__(self, layer: Any, head_dim: int, window: int, weights: DenseWeights):
        attention_module, mlp = layer.self_attn, layer.mlp
        self.qkv = Projection([attention_module.q_proj, attention_module.k_proj, attention_module.v_proj], weights)
        self.o = Projection([attention_module.o_proj], weights)
        self.gate_up = Projection([mlp.gate_proj, mlp.up_proj], weights)
        self.down = Projection([mlp.down_proj], weights)
        self.input_norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.q_norm = getattr(attention_module, "q_norm", None)
        self.k_norm = getattr(attention_module, "k_norm", None)
        self.head_dim, self.window = head_dim, window
        self.scale = attention_module.scaling
        q_width, k_width = self.qkv.columns[0].stop, self.qkv.columns[1].stop - self.qkv.columns[0].stop
        self.num_heads, self.num_kv_heads = q_width // head_dim, k_width // head_dim

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

    # ---- forward ---------------------------------------------------------------------------------

    def attend(self, x: Tensor, rows: PackedSequences) -> "Attended":
        """From the block's input to attention's operands."""
        normed, rstd = _norm(self.input_norm, x)
        z = self.qkv.low_rank(normed)
        qkv = self.qkv.forward(normed, z)
        head_norms = self._norm_heads(qkv) if self.q_norm is not None else None
        rotated = self._heads(qkv)[:, : self.num_heads + self.num_kv_heads]
        rope_(rotated, rows.cos, rows.sin)
        return Attended(rstd, z, qkv, head_norms)

    def mix(self, qkv: Tensor, rows: PackedSequences) -> tuple[Tensor, Tensor]:
        """Attention: (T, q + 2 kv) -> output (T, q) and log-sum-exp (heads, T)."""
        q, k, v = self._split_heads(qkv)
        out, lse = attention_forward(q, k, v, rows.cu_seqlens, scale=self.scale, window=self.window)
        return out.flatten(1), lse

    def _heads(self, qkv: Tensor) -> Tensor:
        return qkv.view(qkv.shape[0], -1, self.head_dim)  # (T, heads + 2 kv heads, head_dim)

    def _split_heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return self._heads(qkv).split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)

    def _norm_heads(self, qkv: Tensor) -> list["HeadNorm"]:
        """Qwen3's norm of each query and key head, in place."""
        q, k, _ = self._split_heads(qkv)
        kept = []
        for heads, norm in ((q, self.q_norm), (k, self.k_norm)):
            before = heads.clone(memory_format=torch.contiguous_format)
            _, rstd = _norm(norm, before, out=heads)
            kept.append(HeadNorm(norm, before, rstd))
        return kept

    # ---- backward --------------------------------------------------------------------------------

    def backward_attend(self, grad_qkv: Tensor, head_norms: list["HeadNorm"] | None, rows: PackedSequences) -> None:
        """Undo rope and head norms on the gradient of attention's operands, in place."""
        grads = self._heads(grad_qkv)
        rope_backward_(grads[:, : self.num_heads + self.num_kv_heads], rows.cos, rows.sin)
        grad_q, grad_k, _ = self._split_heads(grad_qkv)
        for grad, kept in zip((grad_q, grad_k), head_norms or (), strict=False):
            _norm_backward(kept.norm, grad, kept.before, kept.rstd, out=grad)


def decoder_block(layer: Any, config: Any, weights: DenseWeights) -> DecoderBlock:
    """The decoder block over one layer of a model with this config, as the layer's linears are now."""
    config = config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return DecoderBlock(layer, head_dim, _window(layer, config), weights)


def _window(layer: Any, config: Any) -> int:
    """Tokens a layer's attention sees, 0 for all: Qwen sets it per layer, Mistral for the whole model."""
    attention = layer.self_attn
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window or 0
    return getattr(config, "sliding_window", None) or 0


@dataclass
class HeadNorm:
    """What the backward of a norm over heads needs."""

    norm: Any  # an RMSNorm module of transformers
    before: Tensor  # (T, heads, head_dim)
    rstd: Tensor  # (T, heads)


@dataclass
class Attended:
    """What `DecoderBlock.attend` computes."""

    rstd: Tensor  # (T), of the input's norm
    z: Tensor | None  # (T, Σ ranks)
    qkv: Tensor  # (T, q + 2 kv), normed and rotated
    head_norms: list[HeadNorm] | None  # where heads are normed


@dataclass
class Intermediates:
    """Everything a block's backward reads besides its input."""

    attended: Attended
    attention_out: Tensor  # (T, q)
    lse: Tensor  # (heads, T)
    z_o: Tensor | None
    x2: Tensor  # (T, hidden)
    rstd2: Tensor  # (T), of its norm
    z_gate_up: Tensor | None
    gate_up: Tensor  # (T, 2 f)
    z_down: Tensor | None


def _compute(
    block: DecoderBlock, x: Tensor, rows: PackedSequences, kept: tuple[Tensor, Tensor] | None
) -> tuple[Intermediates, Tensor]:
    """The block up to down_proj, and what that reads, (T, f).

    Args:
        kept: attention's output and log-sum-exp when they were kept.
    """
    attended = block.attend(x, rows)
    out, lse = kept or block.mix(attended.qkv, rows)
    z_o = block.o.low_rank(out)
    x2 = block.o.forward(out, z_o, residual=x)
    normed, rstd2 = _norm(block.mlp_norm, x2)
    z_gate_up = block.gate_up.low_rank(normed)
    gate_up = block.gate_up.forward(normed, z_gate_up)
    act = swiglu(*gate_up.chunk(2, dim=1))
    z_down = block.down.low_rank(act)
    return Intermediates(attended, out, lse, z_o, x2, rstd2, z_gate_up, gate_up, z_down), act


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, block: DecoderBlock, rows: PackedSequences, keep: Keep, *parameters: Tensor
    ) -> Tensor:
        parts, act = _compute(block, x, rows, None)
        y = block.down.forward(act, parts.z_down, residual=parts.x2)
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
            s, act = _compute(block, x, rows, tuple(kept_attention) or None)
        else:
            s, act, ctx.kept = ctx.kept, None, None

        grad_z = block.down.backward_low_rank(grad_y)
        grad_act = block.down.backward_input(grad_y, grad_z)
        gate, up = s.gate_up.chunk(2, dim=1)
        if act is None:
            act = torch.empty_like(grad_act)
            swiglu_backward(grad_act, gate, up, gate, up, act)  # s.gate_up now holds its own gradient
        else:
            swiglu_backward(grad_act, gate, up, gate, up)
        del grad_act
        down = block.down.backward_adapters(grad_y, grad_z, act, s.z_down)
        del act

        grad_z = block.gate_up.backward_low_rank(s.gate_up)
        gate_up = block.gate_up.backward_adapters(s.gate_up, grad_z, _norm(block.mlp_norm, s.x2)[0], s.z_gate_up)
        grad_normed = block.gate_up.backward_input(s.gate_up, grad_z)
        grad_x2 = _norm_backward(block.mlp_norm, grad_normed, s.x2, s.rstd2, out=grad_y.clone(), accumulate=True)

        grad_z = block.o.backward_low_rank(grad_x2)
        o = block.o.backward_adapters(grad_x2, grad_z, s.attention_out, s.z_o)
        grad_out = block.o.backward_input(grad_x2, grad_z)
        grad_qkv = torch.empty_like(s.attended.qkv)
        q, k, v = block._split_heads(s.attended.qkv)
        attention_backward(
            grad_out.view(q.shape), q, k, v, s.attention_out.view(q.shape), s.lse, rows.cu_seqlens,
            scale=block.scale, window=block.window, grads=block._split_heads(grad_qkv),
        )  # fmt: skip
        block.backward_attend(grad_qkv, s.attended.head_norms, rows)

        grad_z = block.qkv.backward_low_rank(grad_qkv)
        qkv = block.qkv.backward_adapters(grad_qkv, grad_z, _norm(block.input_norm, x)[0], s.attended.z)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_normed = block.qkv.backward_input(grad_qkv, grad_z)
            grad_x = _norm_backward(block.input_norm, grad_normed, x, s.attended.rstd, out=grad_x2, accumulate=True)
        return grad_x, None, None, None, *qkv, *o, *gate_up, *down


def _norm(norm: Any, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The normed rows and 1 / RMS of each."""
    return rms_norm(x, norm.weight.detach(), norm.variance_epsilon, out=out)


def _norm_backward(norm: Any, grad: Tensor, x: Tensor, rstd: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    return rms_norm_backward(grad, x, norm.weight.detach(), rstd, out=out, accumulate=accumulate)
