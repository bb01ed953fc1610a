"""Where the tokens of a packed batch lie, and the rotary angles of their positions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nybble.families import family_of
from nybble.families.family import Family
from nybble.kernels.slabs import rows_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Angles = Mapping[str, tuple[Tensor, Tensor]]  # kind of layer -> cos and sin, each fp32 (T, rotary_dim / 2)

QUERIES = "queries"  # the kind of the angles of queries, where they are not those of the layer's keys


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
        return rows_at(rows, self.rows)

    def to_rows(self, documents: Tensor) -> Tensor:
        """(D, ..) -> (T, ..)."""
        return rows_at(documents, self.first)

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
    family = family_of(config)
    assert family is not None, config.model_type
    kinds = sorted(set(family.kinds(config)))
    if family.rope_by_kind:
        return {kind: _angles(model, family, position_ids, kind) for kind in kinds}
    angles = dict.fromkeys(kinds, _angles(model, family, position_ids))
    if family.growing_queries:
        (cos, sin), growth = angles[kinds[0]], _growth(config, position_ids)
        angles[QUERIES] = cos * growth, sin * growth  # the whole head is turned
    return angles


def _growth(config: Any, position_ids: Tensor) -> Tensor:
    """What queries at these positions are multiplied by, fp32 `(B * T, 1)`: 1 + β log(1 + ⌊position / original⌋)."""
    rope = config.rope_parameters
    beta, original = rope.get("llama_4_scaling_beta") or 0.0, rope["original_max_position_embeddings"]
    return (1 + beta * torch.log(1 + torch.floor(position_ids / original))).float().view(-1, 1)


def _angles(model: "PreTrainedModel", family: Family, position_ids: Tensor, *kind: str) -> tuple[Tensor, Tensor]:
    cos, sin = model.base_model.rotary_emb(torch.empty(0, device=position_ids.device), position_ids, *kind)
    # transformers repeats each angle for the two elements it turns
    once = slice(None, None, 2) if family.angles_in_pairs else slice(cos.shape[-1] // 2)
    return cos[..., once].flatten(0, 1).contiguous(), sin[..., once].flatten(0, 1).contiguous()


def scaled_embeddings(model: "PreTrainedModel", embedded: Tensor) -> Tensor:
    """What the first block takes, of what the embedding module gave."""
    config = model.config.get_text_config()
    family = family_of(config)
    assert family is not None, config.model_type
    factor = family.embedding_factor(config)
    return embedded if factor == 1.0 else embedded * factor
