"""Rotary angles by each row's own length, for the RoPE variants that choose their frequencies by it.

"dynamic" NTK stretches the frequencies by the length of the sequence, and LongRoPE (arXiv 2402.13753) has two sets of
factors, for short sequences and for long ones. transformers takes the length from the largest position of a call, and
dynamic NTK also from the calls before. So rows beside each other, packed or padded, would all get the frequencies of
the longest. Here each gets what it would get alone, first thing in a fresh model.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RowRotary(nn.Module):
    """A rotary embedding of transformers, asked for rows of one length at a time.

    A row is a run of consecutive positions, and its length is what ends with its last one: so it is in packed rows,
    in padded ones (whose padding is nobody's business), and for the one new token of a text that is being continued.
    """

    def __init__(self, rotary: nn.Module):
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """cos and sin, each `(B, T, rotary_dim)`, for positions `(B, T)`."""
        lengths = row_lengths(position_ids)
        cos = sin = None
        for length in lengths.unique():
            places = lengths == length
            part_cos, part_sin = self.rotary(x, position_ids[places][None], *args, **kwargs)  # (1, n, rotary_dim)
            self.rotary(x, position_ids.new_zeros(1, 1), *args, **kwargs)  # a short row, to forget this one
            if cos is None or sin is None:
                cos, sin = (p.new_empty(*position_ids.shape, p.shape[-1]) for p in (part_cos, part_sin))
            cos[places], sin[places] = part_cos[0], part_sin[0]
        assert cos is not None and sin is not None
        return cos, sin


def row_lengths(position_ids: Tensor) -> Tensor:
    """For each position the length of the row that it is in, int64 like `position_ids`, `(B, T)`."""
    ends = torch.ones_like(position_ids, dtype=torch.bool)
    ends[:, :-1] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    run = ends.flatten().cumsum(0) - ends.flatten().long()  # which run each position is in, rows one after another
    return (position_ids.flatten()[ends.flatten()] + 1)[run].view_as(position_ids)


def rotate_rows_alone(model: "PreTrainedModel") -> None:
    """Let every rotary embedding that goes by the length of a row take each row's own, in place."""
    for name, module in list(model.named_modules()):
        if _goes_by_length(module) and not isinstance(model.get_submodule(name.rpartition(".")[0]), RowRotary):
            model.set_submodule(name, RowRotary(module))


def length_of_change(model: "PreTrainedModel") -> int | None:
    """Tokens beyond which a row gets other frequencies than a short one; None where length changes nothing."""
    rotary = [module.rotary for module in model.modules() if isinstance(module, RowRotary)]
    if not rotary:
        return None
    config: Any = rotary[0].config
    parameters = config.rope_parameters
    layers = [each for each in parameters.values() if isinstance(each, dict)] or [parameters]
    originals = [each.get("original_max_position_embeddings") for each in layers]
    return max((n for n in originals if n), default=config.max_position_embeddings)


def angles_by_length(model: "PreTrainedModel") -> bool:
    """Whether angles are looked up by the length of a row, which the host asks the device for."""
    return any(isinstance(module, RowRotary) or _goes_by_length(module) for module in model.modules())


def _goes_by_length(module: nn.Module) -> bool:
    """As transformers decides it, by the name of the variant, one for all layers or one for each type of layer."""
    kinds: Any = getattr(module, "rope_type", None)
    names = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in names)
