"""What an attention mask of transformers says of a batch: which positions are tokens, and which of them are documents.

transformers hands its layers no mask where every position attends to all before it, or one `(B, 1, T, T)`, true (or 0)
where a position attends; for flash attention the borders of documents instead. Decoder blocks take the tokens side by
side and the borders of documents. A mask that says anything else (bidirectional, prefixes) is recognised as such and
not taken.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The tokens of a batch, side by side.

    Args:
        tokens: int64, their places among the B * T positions; None where all are.
        cu_seqlens: int32 `(documents + 1)`, their borders.
        max_length: of the longest document.
    """

    tokens: Tensor | None
    cu_seqlens: Tensor
    max_length: int


def read_mask(mask: Tensor | None, batch: int, length: int, window: int, device: torch.device) -> Rows | None:
    """Which tokens and documents a mask means; None where it means something else.

    Args:
        window: tokens that a layer's token attends to, itself included; 0 for all before it.
    """
    if mask is None:
        # Under a window shorter than the rows there would be a mask.
        return Rows(None, torch.arange(batch + 1, dtype=torch.int32, device=device) * length, length)
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2:] != (length, length):
        return None
    attends = (mask if mask.dtype == torch.bool else mask == 0)[:, 0].expand(batch, length, length)
    real = attends.diagonal(dim1=1, dim2=2)  # (B, T)
    goes_on = torch.zeros_like(real)
    goes_on[:, 1:] = attends.diagonal(offset=-1, dim1=1, dim2=2)
    starts = real & ~goes_on
    if not torch.equal(attends & real[:, :, None], _expected(real, starts, window)):
        return None
    borders = torch.nonzero(starts[real]).flatten()
    cu_seqlens = torch.cat([borders, real.sum().view(1)]).int()
    tokens = None if bool(real.all()) else torch.nonzero(real.flatten()).flatten()
    return Rows(tokens, cu_seqlens, int(cu_seqlens.diff().max()))


def read_borders(cu_seqlens: Tensor, positions: int) -> Rows | None:
    """What rows without padding say of themselves in place of a mask; None where they leave positions out.

    Args:
        cu_seqlens: `(documents + 1)`, as flash attention takes them.
        positions: of the batch, all rows together.
    """
    whole = int(cu_seqlens[-1]) == positions
    return Rows(None, cu_seqlens.int(), int(cu_seqlens.diff().max())) if whole else None


def _expected(real: Tensor, starts: Tensor, window: int) -> Tensor:
    """The mask of causal attention within documents, `(B, T, T)`, false on what is no token."""
    document = starts.cumsum(1)
    place = torch.arange(real.shape[1], device=real.device)
    distance = place[:, None] - place
    near = (distance >= 0) & (distance < window) if window else distance >= 0
    same = document[:, :, None] == document[:, None, :]
    return near & same & real[:, :, None] & real[:, None, :]
