"""Packed attention: causal inside each document, blind across documents, grouped-query, optionally windowed.

    nybble::packed_attention            q, k, v -> out, lse
    nybble::packed_attention_backward   dout, q, k, v, out, lse -> written into dq, dk, dv

With S = scale * q kᵀ, masked, and P = softmax(S): out = P v and lse = log Σ exp(S). Backward recomputes
P = exp(S - lse) and takes, with delta = Σ dout * out over the head: dv = Pᵀ dout, dS = P * (dout vᵀ - delta),
dq = scale * dS k and dk = scale * dSᵀ q. (FlashAttention-2: Dao 2023, arXiv 2307.08691; the C++ body is
csrc/attention.cpp.)
No body holds a tokens x tokens matrix. Nothing here registers a gradient: callers own their backward.

A tensor of heads is [tokens, heads, head_dim] with each token's heads contiguous; rows may be apart, so that q, k and v
can be views of one fused [tokens, (heads + 2 * kv_heads) * head_dim] buffer, and so can their gradients.
"""

import ctypes
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nybble.errors import FormatError
from nybble.kernels import cpu, registry
from nybble.kernels import reference as reference  # its backend is registered first

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REFERENCE_ROWS = 256  # queries of a document that the reference bodies take at once
MAX_HEAD_DIM = 256  # of the C++ body


# ---- what callers use ----------------------------------------------------------------------------


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, scale: float | None = None, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over documents that lie side by side.

    Args:
        q: [tokens, heads, head_dim].
        k, v: [tokens, kv_heads, head_dim]; heads is a multiple of kv_heads.
        cu_seqlens: int32 [documents + 1], where each document starts, then tokens.
        scale: multiplies the scores; None for 1 / sqrt(head_dim).
        window: a token sees itself and the window - 1 tokens before it; None for all of its document before it.

    Returns:
        out [tokens, heads, head_dim] in q's dtype, and lse [heads, tokens], fp32 (fp64 for fp64 inputs).

    Raises:
        FormatError: shapes, dtypes or cu_seqlens do not fit together.
        KernelError: the backend asked for cannot run.
    """
    return torch.ops.nybble.packed_attention(
        _laid_out(q), _laid_out(k), _laid_out(v), cu_seqlens, _scale(scale, q), window or 0
    )


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `attention_forward` from that of its `out`.

    Args:
        dout: [tokens, heads, head_dim].
        q, k, v, cu_seqlens, scale, window: as given to `attention_forward`.
        out, lse: as it returned them.
        grads: where to write dq, dk and dv, shaped as q, k and v, in memory of their own: they are written while
            what they are made of is still read. None allocates them.

    Returns:
        dq, dk, dv: `grads`, if given.

    Raises:
        FormatError: shapes, dtypes or cu_seqlens do not fit together.
        KernelError: the backend asked for cannot run.
    """
    dq, dk, dv = grads or (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    torch.ops.nybble.packed_attention_backward(
        _laid_out(dout),
        _laid_out(q),
        _laid_out(k),
        _laid_out(v),
        _laid_out(out),
        lse,
        cu_seqlens,
        _scale(scale, q),
        window or 0,
        dq,
        dk,
        dv,
    )
    return dq, dk, dv


def _scale(scale: float | None, q: Tensor) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


def _has_layout(x: Tensor) -> bool:
    """Whether each token's heads are contiguous."""
    _, heads, head_dim = x.shape
    return (head_dim == 1 or x.stride(2) == 1) and (heads == 1 or x.stride(1) == head_dim)


def _laid_out(x: Tensor) -> Tensor:
    return x if x.dim() == 3 and _has_layout(x) else x.contiguous()


# ---- the ops -------------------------------------------------------------------------------------


def _check_forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int) -> None:
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


def _check_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    _check_forward(q, k, v, cu_seqlens, scale, window)
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


def _new_outputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=_lse_dtype(q))


def _fake_backward(*arguments: Tensor | float) -> None:
    return None


_INPUTS = "Tensor q, Tensor k, Tensor v"
registry.declare(
    "packed_attention",
    f"({_INPUTS}, Tensor cu_seqlens, float scale, int window) -> (Tensor out, Tensor lse)",
    _check_forward,
    _new_outputs,
)
registry.declare(
    "packed_attention_backward",
    f"(Tensor dout, {_INPUTS}, Tensor out, Tensor lse, Tensor cu_seqlens, float scale, int window,"
    " Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()",
    _check_backward,
    _fake_backward,
)


def _document_bounds(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """The values of cu_seqlens, checked: a wrong one would read and write outside the tensors."""
    bounds: list[int] = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
        raise FormatError(
            f"cu_seqlens is {bounds[:8]}{'...' if len(bounds) > 8 else ''} over {tokens} tokens.",
            f"It must start at 0, never fall, and end at {tokens}.",
        )
    return bounds


# ---- plain PyTorch -------------------------------------------------------------------------------


def _query_blocks(cu_seqlens: Tensor, tokens: int) -> Iterator[tuple[int, int, int]]:
    """(start of the document, first query, end of the queries) for blocks of queries."""
    bounds = _document_bounds(cu_seqlens, tokens)
    for start, end in itertools.pairwise(bounds):
        for first in range(start, end, REFERENCE_ROWS):
            yield start, first, min(first + REFERENCE_ROWS, end)


def _by_kv_head(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[rows, heads, head_dim] -> [kv_heads, heads // kv_heads, rows, head_dim]."""
    rows, heads, head_dim = x.shape
    return x.to(dtype).reshape(rows, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)


def _by_token(x: Tensor) -> Tensor:
    """[kv_heads, group, rows, head_dim] -> [rows, kv_heads * group, head_dim]."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


def _scores(q: Tensor, k: Tensor, scale: float, window: int) -> Tensor:
    """Masked scores [kv_heads, group, queries, keys] of a document's last `queries` among its first `keys` tokens."""
    queries, keys = q.shape[2], k.shape[2]
    distance = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(keys, device=q.device)
    hidden = (distance < 0) | (distance >= (window or keys))
    return (q @ k.mT * scale).masked_fill(hidden, -math.inf)


@registry.register("packed_attention", "reference")
def _reference_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    out, lse = _new_outputs(q, k, v, cu_seqlens, scale, window)
    kv_heads = k.shape[1]
    for start, first, end in _query_blocks(cu_seqlens, q.shape[0]):
        queries = _by_kv_head(q[first:end], kv_heads, lse.dtype)
        keys, values = (_by_kv_head(x[start:end], kv_heads, lse.dtype) for x in (k, v))
        scores = _scores(queries, keys, scale, window)
        block_lse = scores.logsumexp(-1)  # [kv_heads, group, queries]
        out[first:end] = _by_token((scores - block_lse[..., None]).exp() @ values)
        lse[:, first:end] = block_lse.flatten(0, 1)
    return out, lse


@registry.register("packed_attention_backward", "reference")
def _reference_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    kv_heads = k.shape[1]
    dk_sum, dv_sum = (torch.zeros(k.shape, dtype=lse.dtype, device=k.device) for _ in range(2))
    for start, first, end in _query_blocks(cu_seqlens, q.shape[0]):
        queries, douts, outs = (_by_kv_head(x[first:end], kv_heads, lse.dtype) for x in (q, dout, out))
        keys, values = (_by_kv_head(x[start:end], kv_heads, lse.dtype) for x in (k, v))
        block_lse = lse[:, first:end].view(kv_heads, -1, end - first)
        weights = (_scores(queries, keys, scale, window) - block_lse[..., None]).exp()
        delta = (douts * outs).sum(-1, keepdim=True)
        dscores = weights * (douts @ values.mT - delta) * scale
        dq[first:end] = _by_token(dscores @ keys)
        dk_sum[start:end] += _by_token((dscores.mT @ queries).sum(1, keepdim=True))
        dv_sum[start:end] += _by_token((weights.mT @ douts).sum(1, keepdim=True))
    dk.copy_(dk_sum)
    dv.copy_(dv_sum)


# ---- C++ -----------------------------------------------------------------------------------------


class _Arguments(ctypes.Structure):
    """struct NybbleAttention of csrc/attention.h."""

    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("num_docs", ctypes.c_int32),
        ("cu_seqlens", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("q_stride", ctypes.c_int64),
        ("k_stride", ctypes.c_int64),
        ("v_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("lse", ctypes.c_void_p),
        ("dout", ctypes.c_void_p),
        ("dout_stride", ctypes.c_int64),
        ("dq", ctypes.c_void_p),
        ("dk", ctypes.c_void_p),
        ("dv", ctypes.c_void_p),
        ("dq_stride", ctypes.c_int64),
        ("dk_stride", ctypes.c_int64),
        ("dv_stride", ctypes.c_int64),
    ]


_forward_kernel = cpu.function("attention_forward", cpu.POINTER)
_backward_kernel = cpu.function("attention_backward", cpu.POINTER)


def _arguments(cu_seqlens: Tensor, scale: float, window: int, lse: Tensor, **tensors: Tensor) -> _Arguments:
    q, k = tensors["q"], tensors["k"]
    bounds = _document_bounds(cu_seqlens, q.shape[0])
    arguments = _Arguments(
        dtype=cpu.DTYPES[q.dtype],
        num_docs=len(bounds) - 1,
        cu_seqlens=cu_seqlens.data_ptr(),
        num_tokens=q.shape[0],
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[2],
        window=window,
        scale=scale,
        lse=lse.data_ptr(),
    )
    for name, tensor in tensors.items():
        setattr(arguments, name, tensor.data_ptr())
        setattr(arguments, f"{name}_stride", tensor.stride(0))
    return arguments


def _missing_forward(q: Tensor, *others: object) -> str | None:
    """What the C++ body lacks for these arguments, or None."""
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"takes float32 and bfloat16, not {q.dtype}"
    if q.shape[2] % 2 or q.shape[2] > MAX_HEAD_DIM:
        return f"takes even head sizes up to {MAX_HEAD_DIM}, not {q.shape[2]}"
    return None


def _missing_backward(dout: Tensor, *others: object) -> str | None:
    return _missing_forward(dout)


@registry.register("packed_attention", "cpp", _missing_forward)
def _cpp_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    out, lse = _new_outputs(q, k, v, cu_seqlens, scale, window)
    _forward_kernel(ctypes.byref(_arguments(cu_seqlens, scale, window, lse, q=q, k=k, v=v, out=out)))
    return out, lse


@registry.register("packed_attention_backward", "cpp", _missing_backward)
def _cpp_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    tensors = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "dq": dq, "dk": dk, "dv": dv}
    _backward_kernel(ctypes.byref(_arguments(cu_seqlens, scale, window, lse, **tensors)))
