import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.kernels import registry


@registry.register("cached_attention", "reference", waits=True)
def cached_attention(
    heads: Tensor,
    keys_values: Tensor,
    texts: Tensor,
    columns: Tensor,
    starts: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    (rows, all_heads, head_dim), (_, num_texts, kv_heads, *_) = heads.shape, keys_values.shape
    num_heads = all_heads - 2 * kv_heads
    keys_values[:, texts, :, columns] = heads[:, num_heads:].view(rows, 2, kv_heads, head_dim)
    first, end = max(0, int(columns.min()) + 1 - window) if window else 0, int(columns.max()) + 1
    mask = _visible(first, end, window, columns, starts)
    every = torch.equal(texts, torch.arange(num_texts, device=texts.device))  # else they are picked: a copy
    keys, values = keys_values[:, :, :, first:end] if every else keys_values[:, texts, :, first:end]
    # The heads that share a key head stand where attention expects queries of one head.
    queries = heads[:, :num_heads].view(rows, kv_heads, -1, head_dim)
    if softcap:
        return _capped(queries, keys, values, mask, scale, softcap).reshape(rows, -1)
    return F.scaled_dot_product_attention(queries, keys, values, mask, scale=scale).reshape(rows, -1)


def _capped(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """Attention whose scores have a soft cap, which PyTorch's own has not."""
    scores = (queries.float() @ keys.float().mT) * scale
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ values.float()).to(queries.dtype)


def _visible(first: int, end: int, window: int, columns: Tensor, starts: Tensor) -> Tensor | None:
    """Which columns from `first` to `end` each row sees, bool `(rows, 1, 1, seen)`; None where all see all."""
    least = torch.maximum(starts, columns + 1 - window) if window else starts
    column = torch.arange(first, end, device=columns.device)
    mask = (column >= least[:, None]) & (column <= columns[:, None])
    return None if mask.all() else mask[:, None, None]
