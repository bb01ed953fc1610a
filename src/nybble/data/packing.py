"""How training sequences become one micro-batch.

Packed: the documents stand side by side in one row of T tokens; positions restart at 0 for each, and
attention is block-diagonal (`cu_seqlens` says where the blocks end), so nothing is spent on padding.
Padded: one document a row, for models whose attention cannot be packed.

Targets are already shifted: `targets[b, t]` is the token that position t must predict, which is token
t + 1 of the *same* document, or IGNORE where that token is not supervised or does not exist.

Two documents that begin alike may share the row's tokens of their beginning (`share_beginnings`): `spread` then says
where each document's tokens lie.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_tensor

from nybble.data.examples import EncodedExample
from nybble.kernels.hardware import send

IGNORE = -100

Padded = TypeVar("Padded", bound="Batch")


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch. B is 1 when packed.

    Args:
        input_ids: int64 (B, T).
        position_ids: int64 (B, T), restarting at 0 for each document.
        targets: int64 (B, T), the next token of the same document where it is supervised, else IGNORE.
        cu_seqlens: int32 (num_documents + 1,), the documents' borders in the packed row; None when padded.
        attention_mask: int64 (B, T), 1 on tokens and 0 on padding; None when packed.
        rows: origin ("file:line") of each document.
        document_lengths: tokens of each document.
        supervised_tokens: number of targets that are not IGNORE.
        weights: fp32 (B, T), how much the loss of each target counts; None where each counts 1.
        spread: int64 (D,), the row's token that each of the documents' D tokens is, one document after another, where
            some share a beginning; `targets` and `weights` are of the D then. None where D is T.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None
    attention_mask: Tensor | None
    rows: tuple[str, ...]
    document_lengths: tuple[int, ...]
    supervised_tokens: int
    weights: Tensor | None = None
    spread: Tensor | None = None

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding not counted; those that documents share once."""
        return sum(self.document_lengths) if self.spread is None else self.input_ids.numel()

    @cached_property
    def max_document_length(self) -> int:
        """Tokens of the longest document, or more."""
        return max(self.document_lengths)

    @cached_property
    def supervised_positions(self) -> Tensor:
        """int64 (supervised_tokens,): indices into the flattened (B * T) positions, one for each target."""
        return self._places if self.spread is None else self.spread[self._places]

    @property
    def _places(self) -> Tensor:
        """int64 (supervised_tokens,): where the flattened targets are not IGNORE."""
        return (self.targets.reshape(-1) != IGNORE).nonzero().squeeze(1)

    @cached_property
    def first_places(self) -> Tensor | None:
        """int64 (T,): the first of the documents' tokens that each token of the row is; None without `spread`."""
        return None if self.spread is None else self._is_first(self.spread).nonzero().squeeze(1)

    @cached_property
    def second_places(self) -> Tensor | None:
        """int64: those of the documents' tokens that the row has already; None without `spread`."""
        return None if self.spread is None else (~self._is_first(self.spread)).nonzero().squeeze(1)

    @staticmethod
    def _is_first(spread: Tensor) -> Tensor:
        """A row's tokens come in their order, so that each is new which lies behind all before it."""
        behind = torch.full_like(spread, -1)
        behind[1:] = spread.cummax(0).values[:-1]
        return spread > behind

    @cached_property
    def supervised_targets(self) -> Tensor:
        """int64 (supervised_tokens,): the targets at `supervised_positions`."""
        return self.targets.flatten()[self._places]

    @cached_property
    def supervised_weights(self) -> Tensor | None:
        """fp32 (supervised_tokens,): the weights at `supervised_positions`; None where each counts 1."""
        return None if self.weights is None else self.weights.flatten()[self._places]

    @cached_property
    def largest_target(self) -> int:
        """-1 where no position is supervised."""
        return int(self.supervised_targets.max()) if self.supervised_targets.numel() else -1

    def to(self, device: torch.device | str) -> Self:
        """The batch with its tensors on a device, and with what its values tell: read there, they stop a GPU."""
        return self._mapped(lambda tensor: send(tensor, torch.device(device)))

    def copy(self) -> Self:
        """The batch in memory of its own."""
        return self._mapped(torch.clone)

    def take(self, other: "Batch") -> None:
        """Write the tensors of a batch of the same shapes over one's own, and nothing else."""
        for name, tensor in vars(self).items():
            if isinstance(tensor, Tensor):
                tensor.copy_(vars(other)[name], non_blocking=True)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Self:
        def moved(names: Iterable[str]) -> dict[str, Any]:
            values = {name: getattr(self, name) for name in names}
            return {name: mapped(value) for name, value in values.items()}

        def mapped(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: function(tensor) for name, tensor in value.items()}
            return function(value) if isinstance(value, Tensor) else value

        batch = replace(self, **moved(field.name for field in fields(self)))
        vars(batch).update(moved(name for name, value in vars(Batch).items() if isinstance(value, cached_property)))
        return batch


@dataclass(frozen=True, eq=False, kw_only=True)
class PicturedBatch(Batch):
    """A micro-batch with pictures among its tokens.

    Args:
        pictures: what the model is given of them beside the tokens, by name: `pixel_values` and what belongs to them.
    """

    pictures: dict[str, Tensor]


def fill_up(batch: Batch, *, tokens: int, documents: int, longest: int, supervised: int) -> Batch:
    """The batch in the shapes of larger ones, for graphs: what is added changes no state, loss or gradient.

    Tokens are filled up with a document of arbitrary ones, documents with empty ones, and supervised positions with the
    last one, which has no target. What the batch says of itself in numbers (`document_lengths`, `supervised_tokens`)
    stays, but for `max_document_length`.

    Args:
        batch: packed, on the CPU.
        tokens: in all. documents: of those, the arbitrary one included. longest: tokens that none of them has more of.
        supervised: positions.
    """
    assert batch.cu_seqlens is not None, "padded rows are not filled up"
    missing = tokens - batch.input_ids.shape[1]
    borders = documents + 1 - len(batch.cu_seqlens)
    assert 0 <= missing <= longest and batch.max_document_length <= longest and borders >= bool(missing)
    filled = replace(
        batch,
        input_ids=pad_tensor(batch.input_ids, (0, missing)),
        position_ids=pad_tensor(batch.position_ids, (0, missing)),
        targets=pad_tensor(batch.targets, (0, missing), value=IGNORE),
        cu_seqlens=pad_tensor(batch.cu_seqlens, (0, borders), value=tokens),
        weights=None if batch.weights is None else pad_tensor(batch.weights, (0, missing)),
    )
    rows = (0, supervised - batch.supervised_tokens)
    weights = batch.supervised_weights
    vars(filled).update(
        supervised_positions=pad_tensor(batch.supervised_positions, rows, value=tokens - 1),
        supervised_targets=pad_tensor(batch.supervised_targets, rows, value=IGNORE),
        supervised_weights=None if weights is None else pad_tensor(weights, rows),
        largest_target=batch.largest_target,
        max_document_length=longest,
    )
    return filled


def collate(examples: Sequence[EncodedExample], packed: bool) -> Batch:
    """Side by side in one row, or one a row and padded."""
    return pack(examples) if packed else pad(examples)


def pack_tokens(documents: Sequence[Sequence[int] | Tensor]) -> Batch:
    """Lay documents that are read and not learnt from side by side: no target is supervised."""
    ids = [torch.as_tensor(document, dtype=torch.int32) for document in documents]
    return pack([EncodedExample(each, torch.zeros(len(each), dtype=torch.bool), origin="") for each in ids])


def pack(examples: Sequence[EncodedExample]) -> Batch:
    """Lay documents side by side in one row of sum(lengths) tokens."""
    assert examples, "a batch has at least one document"
    lengths = tuple(len(example) for example in examples)
    borders = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    targets = torch.cat([_targets(example) for example in examples])
    return Batch(
        input_ids=torch.cat([example.input_ids for example in examples]).long().unsqueeze(0),  # (1, T)
        position_ids=torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),  # (1, T)
        targets=targets.unsqueeze(0),  # (1, T)
        cu_seqlens=borders,
        attention_mask=None,
        rows=tuple(example.origin for example in examples),
        document_lengths=lengths,
        supervised_tokens=int((targets != IGNORE).sum()),
        weights=None if (weights := _weights(examples)) is None else torch.cat(weights).unsqueeze(0),  # (1, T)
    )


def share_beginnings(batch: Batch, shared: Sequence[int]) -> Batch:
    """A packed batch of pairs of documents whose second ones no longer have their first tokens, which are those of the
    first ones too.

    Args:
        shared: how many tokens that are, of each pair.
    """
    spread, row, first = [], 0, 0
    for number, length in enumerate(batch.document_lengths):
        common = shared[number // 2] if number % 2 else 0
        spread += [torch.arange(first, first + common), torch.arange(row, row + length - common)]
        first, row = row, row + length - common
    places = torch.cat(spread)
    kept = Batch._is_first(places)
    return replace(batch, input_ids=batch.input_ids[:, kept], position_ids=batch.position_ids[:, kept], spread=places)


def pad(examples: Sequence[EncodedExample], pad_id: int = 0) -> Batch:
    """Lay documents one a row, padded on the right to the longest; `pad_id` is any id the model knows."""
    assert examples, "a batch has at least one document"
    lengths = tuple(len(example) for example in examples)
    width = max(lengths)
    targets = torch.stack([_widen(_targets(example), width, IGNORE) for example in examples])
    return Batch(
        input_ids=torch.stack([_widen(example.input_ids.long(), width, pad_id) for example in examples]),  # (B, T)
        position_ids=torch.stack([_widen(torch.arange(length), width, 0) for length in lengths]),  # (B, T)
        targets=targets,  # (B, T)
        cu_seqlens=None,
        attention_mask=torch.stack([_widen(torch.ones(n, dtype=torch.long), width, 0) for n in lengths]),  # (B, T)
        rows=tuple(example.origin for example in examples),
        document_lengths=lengths,
        supervised_tokens=int((targets != IGNORE).sum()),
        weights=None if (w := _weights(examples)) is None else torch.stack([_widen(x, width, 0) for x in w]),  # (B, T)
    )


def widen(batch: Padded, width: int, pad_id: int) -> Padded:
    """What a model is given of a padded batch, filled up to so many tokens a row. Positions that are asked for are
    still those of the batch as it was.
    """
    missing = width - batch.input_ids.shape[1]
    assert batch.attention_mask is not None
    return replace(
        batch,
        input_ids=pad_tensor(batch.input_ids, (0, missing), value=pad_id),
        position_ids=pad_tensor(batch.position_ids, (0, missing)),
        attention_mask=pad_tensor(batch.attention_mask, (0, missing)),
    )


def _weights(examples: Sequence[EncodedExample]) -> list[Tensor] | None:
    """fp32 (T,) of each example: the weight of the token that each position predicts; None where all count 1."""
    if all(example.weights is None for example in examples):
        return None
    return [_ones(example) if example.weights is None else example.weights.roll(-1) for example in examples]


def _ones(example: EncodedExample) -> Tensor:
    return torch.ones(len(example), dtype=torch.float32)


def _targets(example: EncodedExample) -> Tensor:
    """int64 (T,): the next token where it is supervised, else IGNORE; the last position predicts nothing."""
    targets = torch.full((len(example),), IGNORE, dtype=torch.long)
    targets[:-1] = example.input_ids[1:].long().masked_fill(~example.supervised[1:], IGNORE)
    return targets


def _widen(row: Tensor, width: int, value: int) -> Tensor:
    return pad_tensor(row, (0, width - row.numel()), value=value)
