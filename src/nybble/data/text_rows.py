"""Texts that a model reads whole, as tokens: one or two beside each other, as the tokenizer writes them for it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from nybble.data import packing
from nybble.data.examples import EncodedExample
from nybble.data.packing import Batch

Label = str | int | float


@dataclass(frozen=True, eq=False)
class TextRow(EncodedExample):
    """A text and what it is to be given: a class, or a number.

    Args:
        special: bool (T,), the tokens that the tokenizer adds around texts, which are never cut off.
        token_types: int32 (T,), which of two texts each token is of; None where the model is not told.
        label: as its owner wrote it.
        target: the class's number, or the number to be given; None before all rows are known.
    """

    special: Tensor | None = None
    token_types: Tensor | None = None
    label: Label = ""
    target: float | None = None

    @property
    def supervised_tokens(self) -> int:
        """What is learnt of it: one answer."""
        return 1

    @property
    def content(self) -> bytes:
        types = b"" if self.token_types is None else self.token_types.numpy().tobytes()
        return self.input_ids.numpy().tobytes() + types + repr(self.label).encode()

    def truncate(self, max_seq_len: int) -> Self:
        """With tokens taken off the end of the longer text until it fits, as transformers' `longest_first` does."""
        if len(self) <= max_seq_len:
            return self
        assert self.special is not None
        kept = kept_places(self.special, max_seq_len)
        types = None if self.token_types is None else self.token_types[kept]
        return replace(
            self,
            input_ids=self.input_ids[kept],
            supervised=self.supervised[kept],
            special=self.special[kept],
            token_types=types,
            num_truncated=self.num_truncated + len(self) - len(kept),
        )


def encode_texts(tokenizer: Any, texts: Sequence[str], origin: str, **more: Any) -> TextRow:
    """The row of one or two texts, untruncated, as `tokenizer(*texts)` gives them."""
    found = tokenizer(*texts, return_special_tokens_mask=True, verbose=False)
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


@dataclass(frozen=True, eq=False, kw_only=True)
class TextBatch(Batch):
    """A micro-batch of texts.

    Args:
        labels: fp32 (documents,): of each its class's number, or the number it is to be given.
        last: int64 (documents,): indices into the flattened positions, of each text's last token.
        token_types: int64 (B, T); None where the model is not told.
    """

    labels: Tensor
    last: Tensor
    token_types: Tensor | None = None

    @property
    def supervised_positions(self) -> Tensor:
        """The texts' last tokens."""
        return self.last


def collate_texts(rows: Sequence[TextRow], packed: bool, pad_id: int) -> TextBatch:
    """One micro-batch, as `packing.collate`.

    Args:
        pad_id: what fills padded rows up: some models tell padding by it.
    """
    batch = packing.pack(rows) if packed else packing.pad(rows, pad_id)
    lengths = torch.tensor(batch.document_lengths)
    width = batch.input_ids.shape[1]
    last = lengths.cumsum(0) - 1 if packed else torch.arange(len(rows)) * width + lengths - 1
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    values["supervised_tokens"] = len(rows)
    return TextBatch(
        **values,
        labels=torch.tensor([0.0 if row.target is None else row.target for row in rows]),
        last=last,
        token_types=_types(rows, packed, width),
    )


def _types(rows: Sequence[TextRow], packed: bool, width: int) -> Tensor | None:
    known = [row.token_types.long() for row in rows if row.token_types is not None]
    if len(known) < len(rows):
        return None
    if packed:
        return torch.cat(known)[None]
    return torch.stack([torch.nn.functional.pad(types, (0, width - len(types))) for types in known])
