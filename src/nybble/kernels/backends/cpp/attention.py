"""csrc/attention.cpp."""

import ctypes

import torch
from torch import Tensor

from nybble.kernels import registry
from nybble.kernels.backends.cpp.library import DTYPES, POINTER, function
from nybble.kernels.ops.attention import document_bounds, new_outputs

MAX_HEAD_DIM = 256


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
        ("softcap", ctypes.c_float),
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


_forward_kernel = function("attention_forward", POINTER)
_backward_kernel = function("attention_backward", POINTER)


def _arguments(
    cu_seqlens: Tensor, scale: float, window: int, softcap: float, lse: Tensor, **tensors: Tensor
) -> _Arguments:
    q, k = tensors["q"], tensors["k"]
    bounds = document_bounds(cu_seqlens, q.shape[0])
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
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    out, lse = new_outputs(q, k, v, cu_seqlens, scale, window, softcap)
    _forward_kernel(ctypes.byref(_arguments(cu_seqlens, scale, window, softcap, lse, q=q, k=k, v=v, out=out)))
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
    scale: float,
    window: int,
    softcap: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    tensors = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "dq": dq, "dk": dk, "dv": dv}
    _backward_kernel(ctypes.byref(_arguments(cu_seqlens, scale, window, softcap, lse, **tensors)))
