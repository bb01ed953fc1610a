"""csrc/attention.cpp."""

import ctypes

import torch
from torch import Tensor

from nybble.kernels import registry
from nybble.kernels.backends.cpp.library import DTYPES, FLOAT, INT64, POINTER, function
from nybble.kernels.ops.attention import document_bounds, new_lse
from nybble.kernels.slabs import empty_like

MAX_HEAD_DIM = 256


class _Arguments(ctypes.Structure):
    """struct NybbleAttention of csrc/attention.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("dtype", "num_docs")),
        ("cu_seqlens", POINTER),
        *((name, INT64) for name in ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "window")),
        *((name, FLOAT) for name in ("scale", "softcap")),
        *((name, POINTER) for name in ("q", "k", "v")),
        *((name, INT64) for name in ("q_stride", "k_stride", "v_stride")),
        *(("out", POINTER), ("out_stride", INT64), ("lse", POINTER), ("dout", POINTER), ("dout_stride", INT64)),
        *((name, POINTER) for name in ("dq", "dk", "dv")),
        *((name, INT64) for name in ("dq_stride", "dk_stride", "dv_stride")),
    )


_forward_kernel = function("attention_forward", POINTER)
_backward_kernel = function("attention_backward", POINTER)


def _arguments(
    cu_seqlens: Tensor, max_length: int, scale: float, window: int, softcap: float, lse: Tensor, **tensors: Tensor
) -> _Arguments:
    q, k = tensors["q"], tensors["k"]
    bounds = document_bounds(cu_seqlens, max_length, q.shape[0])
    arguments = _Arguments(
        dtype=DTYPES[q.dtype],
        num_docs=len(bounds) - 1,
        cu_seqlens=cu_seqlens.data_ptr(),
        num_tokens=q.shape[0],
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[2],
        window=window,
        scale=scale,
        softcap=softcap,
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
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    how = (cu_seqlens, max_length, scale, window, softcap)
    out, lse = empty_like(q), new_lse(q)
    _forward_kernel(ctypes.byref(_arguments(*how, lse, q=q, k=k, v=v, out=out)))
    return out, lse


@registry.register("packed_attention_backward", "cpp", _missing_backward)
def packed_attention_backward(
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
    tensors = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "dq": dq, "dk": dk, "dv": dv}
    _backward_kernel(ctypes.byref(_arguments(cu_seqlens, max_length, scale, window, softcap, lse, **tensors)))
