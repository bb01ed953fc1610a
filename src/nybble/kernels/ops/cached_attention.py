"""Attention of one token a row to the keys and values of its text, which lie in a cache: `nybble::cached_attention`.

With S = scale * q kᵀ over the columns that the token sees, and P = softmax(S): out = P v. A soft cap c makes
c tanh(S / c) of S before (Gemma 2, arXiv 2408.00118).
"""

import torch
from torch import Tensor

from nybble.kernels import registry
from nybble.kernels.ops.checks import check_rows, check_tensor, refusal


def cached_attention(
    heads: Tensor,
    keys_values: Tensor,
    texts: Tensor,
    columns: Tensor,
    starts: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Write the rows' keys and values into the cache, then attend to it.

    Where a row is, and what it sees, is read on the device: a graph's next run may find other numbers there.

    Args:
        heads: rows [rows, heads + 2 * kv_heads, head_dim]: queries, keys, values; heads is a multiple of kv_heads.
        keys_values: of one layer, [2, texts, kv_heads, capacity, head_dim], contiguous; finite, also where nothing has
            been written. Written at the rows' columns.
        texts, columns, starts: int64 [rows]: each row's text, its column in the cache, and the first column of its
            text. It sees its text's columns up to its own, also those that other rows write now.
        scale: factor on the scores.
        window: columns that a row sees, its own included; 0 for all.
        softcap: c in c * tanh(scores / c); 0 for none.

    Returns:
        [rows, heads * head_dim], the dtype of heads.
    """
    return torch.ops.nybble.cached_attention(heads, keys_values, texts, columns, starts, scale, window, softcap)


def _check(
    heads: Tensor,
    keys_values: Tensor,
    texts: Tensor,
    columns: Tensor,
    starts: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    check_rows(3, heads=heads)
    rows, all_heads, head_dim = heads.shape
    kv_heads = keys_values.shape[2] if keys_values.dim() == 5 else 0
    shape = (2, *keys_values.shape[1:4], head_dim)
    if kv_heads == 0 or all_heads % kv_heads or all_heads <= 2 * kv_heads:
        raise refusal("keys_values", keys_values, f"keys and values of some heads that {all_heads} heads have")
    check_tensor("keys_values", keys_values, heads, shape, (heads.dtype,))
    for name, tensor in (("texts", texts), ("columns", columns), ("starts", starts)):
        check_tensor(name, tensor, heads, (rows,), (torch.int64,))


def _fake(heads: Tensor, keys_values: Tensor, *others: object) -> Tensor:
    rows, all_heads, head_dim = heads.shape
    return heads.new_empty(rows, (all_heads - 2 * keys_values.shape[2]) * head_dim)


registry.declare(
    "cached_attention",
    "(Tensor heads, Tensor(a!) keys_values, Tensor texts, Tensor columns, Tensor starts, float scale, int window,"
    " float softcap) -> Tensor",
    _check,
    _fake,
)
