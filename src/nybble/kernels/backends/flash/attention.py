"""`aten::_flash_attention_forward` and its backward, over documents side by side.

The public `torch.nn.attention.varlen` calls the same two; but its backward pass is reached through autograd alone,
which would keep what the blocks may want to compute again. Where another version of FlashAttention is activated in
torch (`torch.nn.attention.activate_flash_attention_impl`), it runs here too.

Never run so far: there was no GPU at hand.
"""

from typing import Any

import torch
from torch import Tensor

from nybble.kernels import registry

# What is passed by position, then by name; releases differ in what follows, and in the names of the two tensors of a
# random generator that the backward takes.
_WHERE_AND_HOW = ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal")
_FORWARD = ("query", "key", "value", *_WHERE_AND_HOW, "return_debug_mask")
_BACKWARD = ("grad_out", "query", "key", "value", "out", "logsumexp", *_WHERE_AND_HOW)
_NAMED = {"scale", "window_size_left", "window_size_right"}


def why_another_torch() -> str | None:
    """None where torch's ops take these arguments, else which does not."""
    for op, positional in (("_flash_attention_forward", _FORWARD), ("_flash_attention_backward", _BACKWARD)):
        packet = getattr(torch.ops.aten, op, None)
        names = [] if packet is None else [argument.name for argument in packet.default._schema.arguments]
        if tuple(names[: len(positional)]) != positional or not set(names) >= _NAMED:
            return f"torch {torch.__version__} has another aten::{op}"
    return None


def _how(scale: float, window: int) -> dict[str, Any]:
    """Of a token's own document it sees itself and so many before it; -1 is all of them."""
    return {"scale": scale, "window_size_left": window - 1 if window else -1, "window_size_right": 0}


def _missing_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, scale: float, window: int, softcap: float
) -> str | None:
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {q.dtype}"
    if q.shape[2] % 8 or q.shape[2] > 256:
        return f"takes head sizes that are multiples of 8 up to 256, not {q.shape[2]}"
    if softcap:
        return "has no soft cap on the scores"
    if any(x.stride(0) % 8 or x.data_ptr() % 16 for x in (q, k, v)):
        return "takes tokens that begin at multiples of 16 bytes"
    return None


def _missing_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *how: Any) -> str | None:
    cu_seqlens, max_length, scale, window, softcap, *_ = how
    return _missing_forward(q, k, v, cu_seqlens, max_length, scale, window, softcap)


@registry.register("packed_attention", "flash", _missing_forward)
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    where = (cu_seqlens, cu_seqlens, max_length, max_length)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *where, 0.0, True, False, **_how(scale, window))
    return out, lse


@registry.register("packed_attention_backward", "flash", _missing_backward)
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
    where = (cu_seqlens, cu_seqlens, max_length, max_length)
    random = q.new_empty(0)  # nothing is drawn without dropout
    grads = torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, *where, 0.0, True, random, random, **_how(scale, window)
    )
    for into, grad in zip((dq, dk, dv), grads, strict=True):
        into.copy_(grad)
