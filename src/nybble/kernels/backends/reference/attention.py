import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nybble.kernels import registry
from nybble.kernels.ops.attention import document_bounds, new_outputs

REFERENCE_ROWS = 256  # queries of a document that are taken at once


def _query_blocks(cu_seqlens: Tensor, max_length: int, tokens: int) -> Iterator[tuple[int, int, int]]:
    """(start of the document, first query, end of the queries) for blocks of queries."""
    bounds = document_bounds(cu_seqlens, max_length, tokens)
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


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """Scores [kv_heads, group, queries, keys]."""
    scores = q @ k.mT * scale
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def _masked(scores: Tensor, window: int) -> Tensor:
    """The scores of a document's last `queries` among its first `keys` tokens, -inf where a key is not seen."""
    queries, keys = scores.shape[-2:]
    positions = torch.arange(keys, device=scores.device)
    distance = positions[keys - queries :, None] - positions
    hidden = (distance < 0) | (distance >= (window or keys))
    return scores.masked_fill(hidden, -math.inf)


@registry.register("packed_attention", "reference", waits=True)
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    out, lse = new_outputs(q, k, v, cu_seqlens, max_length, scale, window, softcap)
    kv_heads = k.shape[1]
    for start, first, end in _query_blocks(cu_seqlens, max_length, q.shape[0]):
        queries = _by_kv_head(q[first:end], kv_heads, lse.dtype)
        keys, values = (_by_kv_head(x[start:end], kv_heads, lse.dtype) for x in (k, v))
        scores = _masked(_scores(queries, keys, scale, softcap), window)
        block_lse = scores.logsumexp(-1)  # [kv_heads, group, queries]
        out[first:end] = _by_token((scores - block_lse[..., None]).exp() @ values)
        lse[:, first:end] = block_lse.flatten(0, 1)
    return out, lse


@registry.register("packed_attention_backward", "reference", waits=True)
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
    kv_heads = k.shape[1]
    dk_sum, dv_sum = (torch.zeros(k.shape, dtype=lse.dtype, device=k.device) for _ in range(2))
    for start, first, end in _query_blocks(cu_seqlens, max_length, q.shape[0]):
        queries, douts, outs = (_by_kv_head(x[first:end], kv_heads, lse.dtype) for x in (q, dout, out))
        keys, values = (_by_kv_head(x[start:end], kv_heads, lse.dtype) for x in (k, v))
        block_lse = lse[:, first:end].view(kv_heads, -1, end - first)
        scores = _scores(queries, keys, scale, softcap)
        weights = (_masked(scores, window) - block_lse[..., None]).exp()
        delta = (douts * outs).sum(-1, keepdim=True)
        dscores = weights * (douts @ values.mT - delta) * scale
        if softcap:
            dscores *= 1 - (scores / softcap).square()
        dq[first:end] = _by_token(dscores @ keys)
        dk_sum[start:end] += _by_token((dscores.mT @ queries).sum(1, keepdim=True))
        dv_sum[start:end] += _by_token((weights.mT @ douts).sum(1, keepdim=True))
    dk.copy_(dk_sum)
    dv.copy_(dv_sum)
