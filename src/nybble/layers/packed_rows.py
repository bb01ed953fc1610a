"""Where the tokens of a packed batch lie, and the rotary angles of their positions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nybble.families import FAMILIES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Angles = Mapping[str, tuple[Tensor, Tensor]]  # kind of layer -> cos and sin, each fp32 (T, rotary_dim / 2)


class Spread(NamedTuple):
    """How documents share the rows of a batch; each is a part of two at most.

    Args:
        rows: int64 `(D)`, the row of each of the documents' tokens.
        first: int64 `(T)`, the first token that each row is.
        second: int64, tokens whose rows others were before.
    """

    rows: Tensor
    first: Tensor
    second: Tensor

    def to_documents(self, rows: Tensor) -> Tensor:
        """(T, ..) -> (D, ..)."""
        return rows.index_select(0, self.rows)

    def gradient(self, grad: Tensor, out: Tensor) -> None:
        """Of the rows, into `out` (T, ..), from that of the documents' tokens (D, ..)."""
        torch.index_select(grad, 0, self.first, out=out)
        out.index_add_(0, self.rows[self.second], grad.index_select(0, self.second))


@dataclass(frozen=True)
class PackedSequences:
    """Where the T tokens of a packed batch lie, the same for every block.

    Args:
        angles: of each token's position, for each kind of layer.
        cu_seqlens: int32 `(num_documents + 1)`, the documents' borders.
        max_length: tokens of the longest document.
        spread: where documents share rows; only attention tells them apart.
    """

    angles: Angles
    cu_seqlens: Tensor
    max_length: int
    spread: Spread | None = None


def rotary_angles(model: "PreTrainedModel", position_ids: Tensor) -> Angles:
    """cos and sin of the model's own RoPE variants, each fp32 `(B * T, rotary_dim / 2)`, for positions `(B, T)`.

    In fp32 whatever the compute dtype: bf16 positions lose whole tokens beyond 256.
    """
    config = model.config.get_text_config()
    family = FAMILIES[config.model_type]
    kinds = sorted(set(family.kinds(config)))
    if family.rope_by_kind:
        return {kind: _angles(model, position_ids, kind) for kind in kinds}
    return dict.fromkeys(kinds, _angles(model, position_ids))


def _angles(model: "PreTrainedModel", position_ids: Tensor, *kind: str) -> tuple[Tensor, Tensor]:
    cos, sin = model.base_model.rotary_emb(torch.empty(0, device=position_ids.device), position_ids, *kind)
    half = cos.shape[-1] // 2  # transformers repeats each angle for the two elements it turns
    return cos[..., :half].flatten(0, 1).contiguous(), sin[..., :half].flatten(0, 1).contiguous()


def scaled_embeddings(model: "PreTrainedModel", embedded: Tensor) -> Tensor:
    """What the first block takes, of what the embedding module gave."""
    config = model.config.get_text_config()
    factor = FAMILIES[config.model_type].embedding_factor(config)
    return embedded if factor == 1.0 else embedded * factor
