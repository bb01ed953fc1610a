"""Packed attention: causal inside each document, blind across documents, grouped-query, optionally windowed.

    nybble::packed_attention            q, k, v -> out, lse
    nybble::packed_attention_backward   dout, q, k, v, out, lse -> written into dq, dk, dv

With S = scale * q kᵀ, masked, and P = softmax(S): out = P v and lse = log Σ exp(S). A soft cap c makes c tanh(S / c) of
S before the mask (Gemma 2, arXiv 2408.00118); dS is then times 1 - tanh²(S / c). Backward recomputes
P = exp(S - lse) and takes, with delta = Σ dout * out over the head: dv = Pᵀ dout, dS = P * (dout vᵀ - delta),
dq = scale * dS k and dk = scale * dSᵀ q. (FlashAttention-2: Dao 2023, arXiv 2307.08691.)
No body holds a tokens x tokens matrix. Nothing here registers a gradient: callers own their backward.

A tensor of heads is [tokens, heads, head_dim] with each token's heads contiguous; rows may be apart, so that q, k and v
can be views of one fused [tokens, (heads + 2 * kv_heads) * head_dim] buffer, and so can their gradients.
"""

import itertools
import math

import torch
from torch import Tensor

from nybble.errors import FormatError
from nybble.kernels import registry
from nybble.kernels.ops.checks import nothing
from nybble.kernels.slabs import empty_like

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention over documents that lie side by side.

    Args:
        q: [tokens, heads, head_dim].
        k, v: [tokens, kv_heads, head_dim]; heads is a multiple of kv_heads.
        cu_seqlens: int32 [documents + 1], where each document starts, then tokens.
        max_length: tokens of the longest document, or more: a GPU need not be waited for to know it.
        scale: multiplies the scores; None for 1 / sqrt(head_dim).
        window: a token sees itself and the window - 1 tokens before it; None for all of its document before it.
        softcap: c in c * tanh(scores / c); 0 for none.

    Returns:
        out [tokens, heads, head_dim] in q's dtype, and lse [heads, tokens], fp32 (fp64 for fp64 inputs).

    Raises:
        FormatError: shapes, dtypes or cu_seqlens do not fit together.
        KernelError: the backend asked for cannot run.
    """
    q, k, v = map(_laid_out, (q, k, v))
    how = (cu_seqlens, max_length, _scale(scale, q), window or 0, softcap)
    return torch.ops.nybble.packed_attention(q, k, v, *how)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `attention_forward` from that of its `out`.

    Args:
        dout: [tokens, heads, head_dim].
        q, k, v, cu_seqlens, max_length, scale, window, softcap: as given to `attention_forward`.
        out, lse: as it returned them.
        grads: where to write dq, dk and dv, shaped as q, k and v, in memory of their own: they are written while
            what they are made of is still read. None allocates them.

    Returns:
        dq, dk, dv: `grads`, if given.

    Raises:
        FormatError: shapes, dtypes or cu_seqlens do not fit together.
        KernelError: the backend asked for cannot run.
    """
    dq, dk, dv = grads or (empty_like(q), empty_like(k), empty_like(v))
    dout, q, k, v, out = map(_laid_out, (dout, q, k, v, out))
    how = (cu_seqlens, max_length, _scale(scale, q), window or 0, softcap)
    torch.ops.nybble.packed_attention_backward(dout, q, k, v, out, lse, *how, dq, dk, dv)
    return dq, dk, dv


def _scale(scale: float | None, q: Tensor) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


def _has_layout(x: Tensor) -> bool:
    """Whether each token's heads are contiguous."""
    _, heads, head_dim = x.shape
    return (head_dim == 1 or x.stride(2) == 1) and (heads == 1 or x.stride(1) == head_dim)


def _laid_out(x: Tensor) -> Tensor:
    return x if x.dim() == 3 and _has_layout(x) else x.contiguous()


def _check_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, scale: float, window: int, softcap: float
) -> None:
    tensors = {"q": q, "k": k, "v": v}
    if any(x.dim() != 3 for x in tensors.values()):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise FormatError(f"Got {shapes}.", "Each must be [tokens, heads, head_dim].")
    tokens, heads, head_dim = q.shape
    if q.dtype not in DTYPES:
        raise FormatError(f"q is {q.dtype}.", f"Allowed: {', '.join(map(str, DTYPES))}.")
    if 0 in k.shape[1:] or heads % k.shape[1] != 0 or head_dim == 0:
        raise FormatError(
            f"{heads} query heads share {k.shape[1]} key heads of {head_dim}.",
            "The number of query heads must be a multiple of the number of key heads, and no size 0.",
        )
    _check_like("k", k, (tokens, k.shape[1], head_dim), q)
    _check_like("v", v, tuple(k.shape), q)
    if not _has_layout(q):
        raise FormatError(f"q has strides {q.stride()}.", "The heads of one token must be contiguous.")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or not cu_seqlens.is_contiguous():
        raise FormatError(
            f"cu_seqlens is {cu_seqlens.dtype}, shape {tuple(cu_seqlens.shape)}.", "It must be contiguous int32, 1-D."
        )
    if not (math.isfinite(scale) and scale > 0) or window < 0:
        raise FormatError(f"scale is {scale}, window {window}.", "scale must be above 0, window 0 (none) or more.")
    if not (math.isfinite(softcap) and softcap >= 0):
        raise FormatError(f"softcap is {softcap}.", "It must be 0 (none) or more.")


def _check_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float,
    window: int,
    softcap: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    _check_forward(q, k, v, cu_seqlens, max_length, scale, window, softcap)
    for name, x in (("dout", dout), ("out", out), ("dq", dq)):
        _check_like(name, x, tuple(q.shape), q)
    for name, x in (("dk", dk), ("dv", dv)):
        _check_like(name, x, tuple(k.shape), q)
    if lse.shape != (q.shape[1], q.shape[0]) or lse.dtype != _lse_dtype(q) or not lse.is_contiguous():
        raise FormatError(
            f"lse is {lse.dtype}, shape {tuple(lse.shape)}.",
            f"It must be contiguous {_lse_dtype(q)}, shape {(q.shape[1], q.shape[0])}: what the forward returned.",
        )
    read = {x.untyped_storage()._cdata for x in (dout, q, k, v, out, lse)}
    for name, x in (("dq", dq), ("dk", dk), ("dv", dv)):
        if x.untyped_storage()._cdata in read:
            raise FormatError(f"{name} lies in memory that it is made of.", "A gradient needs memory of its own.")


def _check_like(name: str, x: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    if tuple(x.shape) != shape or x.dtype != q.dtype or x.device != q.device or not _has_layout(x):
        raise FormatError(
            f"{name} is {x.dtype}, shape {tuple(x.shape)}, strides {x.stride()}, on {x.device}.",
            f"It must be {q.dtype}, shape {shape}, on {q.device}, with the heads of one token contiguous.",
        )


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def new_outputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), new_lse(q)


def new_lse(q: Tensor) -> Tensor:
    """Room for the log-sum-exp, [heads, tokens]."""
    return empty_like(q, (q.shape[1], q.shape[0]), _lse_dtype(q))


_INPUTS = "Tensor q, Tensor k, Tensor v"
_HOW = "Tensor cu_seqlens, int max_length, float scale, int window, float softcap"


registry.declare(
    "packed_attention",
    f"({_INPUTS}, {_HOW}) -> (Tensor out, Tensor lse)",
    _check_forward,
    new_outputs,
)
registry.declare(
    "packed_attention_backward",
    f"(Tensor dout, {_INPUTS}, Tensor out, Tensor lse, {_HOW}, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()",
    _check_backward,
    nothing,
)


def document_bounds(cu_seqlens: Tensor, max_length: int, tokens: int) -> list[int]:
    """The values of cu_seqlens, checked: a wrong one would read and write outside the tensors. A GPU is waited for."""
    bounds: list[int] = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
        raise FormatError(
            f"cu_seqlens is {bounds[:8]}{'...' if len(bounds) > 8 else ''} over {tokens} tokens.",
            f"It must start at 0, never fall, and end at {tokens}.",
        )
    longest = max((end - start for start, end in itertools.pairwise(bounds)), default=0)
    if longest > max_length:
        raise FormatError(f"max_length is {max_length}.", f"The longest document has {longest} tokens.")
    return bounds
