"""jit/cached_attention.py."""

import torch
from torch import Tensor

from nybble.kernels import registry
from nybble.kernels.backends.triton.launch import launch, power_of_two

COLUMNS = 32  # at once, whose keys lie in the registers of a program
MOST_PARTS = 16  # that a row's columns are dealt to


@registry.register("cached_attention", "triton")
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
    from nybble.kernels.backends.triton.jit.cached_attention import cached_attention_kernel, join_kernel

    (rows, all_heads, head_dim), (_, _, kv_heads, capacity, _) = heads.shape, keys_values.shape
    num_heads, width = all_heads - 2 * kv_heads, power_of_two(head_dim)
    keys_values[:, texts, :, columns] = heads[:, num_heads:].view(rows, 2, kv_heads, head_dim)
    parts = min(power_of_two(-(-min(capacity, window or capacity) // COLUMNS)), MOST_PARTS)
    programs = rows * num_heads * parts
    maxima, sums = torch.empty(2, programs, dtype=torch.float32, device=heads.device)
    outputs = torch.empty(programs, width, dtype=torch.float32, device=heads.device)
    launch(
        cached_attention_kernel, programs, heads, *keys_values, texts, columns, starts, maxima, sums, outputs,
        heads.stride(0), num_heads, kv_heads, head_dim, capacity, window, scale, softcap,
        SOFTCAP=softcap > 0, PARTS=parts, COLUMNS=COLUMNS, WIDTH=width,
    )  # fmt: skip
    out = heads.new_empty(rows, num_heads * head_dim)
    launch(join_kernel, rows * num_heads, maxima, sums, outputs, out, head_dim, PARTS=parts, WIDTH=width)
    return out
