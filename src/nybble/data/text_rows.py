"""Texts that a model reads whole, as tokens: one or two beside each other, as the tokenizer writes them for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from nybble.data import packing
from nybble.data.examples import EncodedExample, extended
from nybble.data.packing import Batch

Label = str | int | float
Labels = tuple[Label, ...]


@dataclass(frozen=True, eq=False)
class TextRow(EncodedExample):
    """A text and what it is to be given: a class, or a number; classes, any number of them; or a class for each of some
    tokens.

    Args:
        special: bool (T,), the tokens that the tokenizer adds around texts, which are never cut off.
        token_types: int32 (T,), which of two texts each token is of; None where the model is not told.
        label: as its owner wrote it; several classes, and those of tokens, as a tuple.
        target: the class's number, or the number to be given; fp32 (1, labels), 1 for each class that it has; fp32 of
            each labelled token its class's number; of a pair's chosen answer the margin. None where there is none, or
            before all rows are known.
        units: int32 (T,), which of `label` each token is given, -1 for none; None where they are the whole text's.
    """

    special: Tensor | None = None
    token_types: Tensor | None = None
    label: Label | Labels = ""
    target: float | Tensor | None = None
    units: Tensor | None = None

    @property
    def labels(self) -> Labels:
        """All that it is given."""
        return self.label if isinstance(self.label, tuple) else (self.label,)

    @property
    def places(self) -> Tensor:
        """int64 (N,): the tokens at which it is given what is learnt: those with a label, or the text's last."""
        return torch.tensor([len(self) - 1]) if self.units is None else (self.units >= 0).nonzero().flatten()

    @property
    def token_labels(self) -> Labels:
        """Of each labelled token its label."""
        assert self.units is not None
        return tuple(self.labels[unit] for unit in self.units.tolist() if unit >= 0)

    @property
    def supervised_tokens(self) -> int:
        """What is learnt of it: one answer, or one for each labelled token."""
        return 1 if self.units is None else int((self.units >= 0).sum())

    @property
    def content(self) -> bytes:
        parts = (self.input_ids, self.token_types, self.units)
        return b"".join(part.numpy().tobytes() for part in parts if part is not None) + repr(self.label).encode()

    def truncate(self, max_seq_len: int) -> Self:
        """With tokens taken off the end of the longer text until it fits, as transformers' `longest_first` does."""
        if len(self) <= max_seq_len:
            return self
        assert self.special is not None
        kept = kept_places(self.special, max_seq_len)
        return replace(
            self,
            input_ids=self.input_ids[kept],
            supervised=self.supervised[kept],
            special=self.special[kept],
            token_types=None if self.token_types is None else self.token_types[kept],
            units=None if self.units is None else self.units[kept],
            num_truncated=self.num_truncated + len(self) - len(kept),
        )


def encode_texts(tokenizer: Any, texts: Sequence[str], origin: str, **more: Any) -> TextRow:
    """The row of one or two texts, untruncated, as `tokenizer(*texts)` gives them."""
    return row_of(tokenizer(*texts, return_special_tokens_mask=True, verbose=False), origin, **more)


def row_of(found: Mapping[str, Any], origin: str, **more: Any) -> TextRow:
    """The row of what a tokenizer gives, its special tokens marked."""
    ids = torch.tensor(found["input_ids"], dtype=torch.int32)
    special = torch.tensor(found["special_tokens_mask"], dtype=torch.bool)
    types = found.get("token_type_ids")
    supervised = torch.zeros(len(ids), dtype=torch.bool)
    supervised[-1:] = True
    token_types = None if types is None else torch.tensor(types, dtype=torch.int32)
    return TextRow(ids, supervised, origin, special=special, token_types=token_types, **more)


def kept_places(special: Tensor, max_seq_len: int) -> Tensor:
    """int64: the places that stay of a text, or of two, when the longer one loses tokens at its end until all fits.

    Args:
        special: bool (T,), tokens that stay.
    """
    number = torch.cat([torch.tensor([0]), (special[1:] & ~special[:-1]).cumsum(0)]) * ~special  # of each text's tokens
    texts = [((number == each) & ~special).nonzero().flatten() for each in number[~special].unique()]
    room = max(0, max_seq_len - int(special.sum()))
    lengths = [len(text) for text in texts]
    if len(lengths) == 2:
        shorter = min(min(lengths), room // 2)
        most = room - shorter
        lengths = [min(length, most if length == max(lengths) else shorter) for length in lengths]
        if lengths[0] == lengths[1] and sum(lengths) > room:
            lengths = [room // 2, room - room // 2]
    elif lengths:
        lengths = [min(lengths[0], room)]
    kept = [text[:length] for text, length in zip(texts, lengths, strict=True)]
    return torch.cat([special.nonzero().flatten(), *kept]).sort().values


@dataclass(frozen=True, eq=False)
class TextsRow(EncodedExample):
    """Texts that are told apart by what the model gives of each, one behind the other.

    Args:
        lengths: tokens of each.
        special: bool (T,), as a `TextRow` has them; None where they are not told.
    """

    lengths: tuple[int, ...] = ()
    special: Tensor | None = None

    @classmethod
    def of(cls, texts: Sequence[TextRow], **more: Any) -> Self:
        """The row of these texts.

        Args:
            more: of the subclass.
        """
        special = [text.special for text in texts if text.special is not None]
        return cls(
            torch.cat([text.input_ids for text in texts]),
            torch.cat([text.supervised for text in texts]),
            texts[0].origin,
            sum(text.num_truncated for text in texts),
            lengths=tuple(map(len, texts)),
            special=torch.cat(special) if len(special) == len(texts) else None,
            **more,
        )

    @property
    def texts(self) -> tuple[TextRow, ...]:
        """Each by itself."""
        ids, supervised = self.input_ids.split(self.lengths), self.supervised.split(self.lengths)
        special = [None] * len(ids) if self.special is None else self.special.split(self.lengths)
        parts = zip(ids, supervised, special, strict=True)
        return tuple(TextRow(each, learnt, self.origin, special=kept) for each, learnt, kept in parts)

    @property
    def supervised_tokens(self) -> int:
        """What is learnt of it: something of each text."""
        return len(self.lengths)

    @property
    def num_targets(self) -> int:
        return len(self.lengths)

    @property
    def document_lengths(self) -> tuple[int, ...]:
        return self.lengths

    @property
    def learnt_documents(self) -> tuple[EncodedExample, ...]:
        """None of their tokens is learnt to be said."""
        return ()

    @property
    def content(self) -> bytes:
        return super().content + repr(self.lengths).encode()


def texts_of(rows: Sequence[EncodedExample]) -> list[TextRow]:
    """All texts of rows, one after another."""
    found: list[TextRow] = []
    for row in rows:
        found += row.texts if isinstance(row, TextsRow) else [row] if isinstance(row, TextRow) else []
    return found


@dataclass(frozen=True, eq=False, kw_only=True)
class TextBatch(Batch):
    """A micro-batch of texts.

    Args:
        labels: fp32 (N,): of each text, or of each labelled token, its target; 0 where it has none; (N, labels): 1 for
            each class that a text has.
        last: int64 (documents,): indices into the flattened positions, of each text's last token.
        counts: of the N, how many are each text's.
        labelled: int64 (N,): as `last`, of all labelled tokens; None where whole texts have labels.
        token_types: int64 (B, T); None where the model is not told.
    """

    labels: Tensor
    last: Tensor
    counts: tuple[int, ...]
    labelled: Tensor | None = None
    token_types: Tensor | None = None

    @property
    def supervised_positions(self) -> Tensor:
        """The texts' last tokens, or the labelled ones."""
        return self.last if self.labelled is None else self.labelled

    @property
    def first(self) -> Tensor:
        """int64 (documents,): as `last`, of each text's first token."""
        lengths = torch.tensor(self.document_lengths, device=self.last.device)
        return self.last - lengths + 1

    @property
    def places(self) -> Tensor:
        """int64 (N,): indices into the flattened positions, of all tokens, one text after another."""
        within = [torch.arange(length) for length in self.document_lengths]
        lengths = torch.tensor(self.document_lengths)
        return self.first.repeat_interleave(lengths.to(self.last.device)) + torch.cat(within).to(self.last.device)


def collate_texts(rows: Sequence[TextRow], packed: bool, pad_id: int, shared: Sequence[int] = ()) -> TextBatch:
    """One micro-batch, as `packing.collate`.

    Args:
        pad_id: what fills padded rows up: some models tell padding by it.
        shared: tokens that the two texts of each pair of rows begin with, and that are there once.
    """
    batch = packing.pack(rows) if packed else packing.pad(rows, pad_id)
    lengths = torch.tensor(batch.document_lengths)
    width = batch.input_ids.shape[1]
    last = lengths.cumsum(0) - 1 if packed else torch.arange(len(rows)) * width + lengths - 1
    if shared:
        batch = packing.share_beginnings(batch, shared)
        assert batch.spread is not None
        last = batch.spread[last]
    places = [row.places for row in rows]
    labelled = [first + own for first, own in zip(last - lengths + 1, places, strict=True)]
    return extended(
        batch,
        TextBatch,
        supervised_tokens=sum(map(len, places)),
        labels=torch.cat([_target(row) for row in rows]),
        last=last,
        counts=tuple(map(len, places)),
        labelled=torch.cat(labelled) if any(row.units is not None for row in rows) else None,
        token_types=_types(rows, packed, width),
    )


def _target(row: TextRow) -> Tensor:
    """What is learnt at each of its places; 0 where nothing is known."""
    return row.target if isinstance(row.target, Tensor) else torch.full((len(row.places),), row.target or 0.0)


def _types(rows: Sequence[TextRow], packed: bool, width: int) -> Tensor | None:
    known = [row.token_types.long() for row in rows if row.token_types is not None]
    if len(known) < len(rows):
        return None
    if packed:
        return torch.cat(known)[None]
    return torch.stack([torch.nn.functional.pad(types, (0, width - len(types))) for types in known])
