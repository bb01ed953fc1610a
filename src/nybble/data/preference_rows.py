"""Rows that compare answers, as tokens: pairs of a chosen and a rejected answer, and answers judged good or bad.

To whatever deals, counts and cuts rows they are rows like others; `compare` lays their documents side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from nybble.data import packing
from nybble.data.encoded_rows import ChangedRows, EncodedRows, counted
from nybble.data.examples import EncodedExample, extended
from nybble.data.packing import Batch
from nybble.data.permutation import permutation


@dataclass(frozen=True, eq=False)
class PreferenceRow(EncodedExample):
    """A row whose loss depends on log-probabilities of whole answers, and on those that a reference gave them.

    Args:
        reference: summed log-probability of the answer of each of `documents`, nats; empty where it is not known.
    """

    reference: tuple[float, ...] = ()

    @property
    def documents(self) -> tuple[EncodedExample, ...]:
        """What the reference is asked about."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class EncodedPair(PreferenceRow):
    """Two answers to one prompt: the documents of the chosen and of the rejected one, one behind the other.

    Args:
        border: tokens of the first.
        cut: tokens cut off at the end of each.
        learns_prompt: the chosen document is learnt as a whole, its prompt too.
    """

    border: int = 0
    cut: tuple[int, int] = (0, 0)
    learns_prompt: bool = False

    @classmethod
    def of(cls, chosen: EncodedExample, rejected: EncodedExample, learns_prompt: bool = False) -> Self:
        return cls(
            torch.cat([chosen.input_ids, rejected.input_ids]),
            torch.cat([chosen.supervised, rejected.supervised]),
            chosen.origin,
            chosen.num_truncated + rejected.num_truncated,
            border=len(chosen),
            cut=(chosen.num_truncated, rejected.num_truncated),
            learns_prompt=learns_prompt,
        )

    @property
    def documents(self) -> tuple[EncodedExample, EncodedExample]:
        """The chosen one, and the rejected."""
        ids, supervised = self.input_ids.tensor_split([self.border]), self.supervised.tensor_split([self.border])
        parts = zip(ids, supervised, self.cut, strict=True)
        chosen, rejected = (EncodedExample(each, learnt, self.origin, cut) for each, learnt, cut in parts)
        return chosen, rejected

    @property
    def learnt_documents(self) -> tuple[EncodedExample, ...]:
        return self.documents

    @property
    def document_lengths(self) -> tuple[int, ...]:
        return self.border, len(self) - self.border

    @property
    def supervised_tokens(self) -> int:
        """Tokens of both answers; 0 where one has none, or they are the same: from such a pair nothing is learnt."""
        chosen, rejected = self.documents
        counts = chosen.supervised_tokens, rejected.supervised_tokens
        return sum(counts) if all(counts) and not torch.equal(chosen.input_ids, rejected.input_ids) else 0

    @property
    def num_targets(self) -> int:
        prompt = self.border - 1 - self.documents[0].supervised_tokens if self.learns_prompt else 0
        return self.supervised_tokens + prompt

    @property
    def shared_tokens(self) -> int:
        chosen, rejected = (document.input_ids for document in self.documents)
        least = min(len(chosen), len(rejected))
        return int((chosen[:least] == rejected[:least]).int().cumprod(0).sum())

    @property
    def content(self) -> bytes:
        return super().content + self.border.to_bytes(8, "little")

    def truncate(self, max_seq_len: int) -> Self:
        """Both documents cut to `max_seq_len` tokens."""
        if max(self.document_lengths) <= max_seq_len:
            return self
        chosen, rejected = (document.truncate(max_seq_len) for document in self.documents)
        return self.of(chosen, rejected, self.learns_prompt)


@dataclass(frozen=True, eq=False)
class JudgedAnswer(PreferenceRow):
    """An answer that is good or bad, and its prompt.

    Args:
        desirable: it is good.
        mismatched: the prompt with another row's answer, from which KTO tells how far the model is from its reference.
    """

    desirable: bool = True
    mismatched: EncodedExample | None = None

    @classmethod
    def of(cls, row: EncodedExample, desirable: bool) -> Self:
        return cls(row.input_ids, row.supervised, row.origin, row.num_truncated, desirable=desirable)

    @property
    def documents(self) -> tuple[EncodedExample, ...]:
        """The answer's own, and the mismatched one."""
        own = EncodedExample(self.input_ids, self.supervised, self.origin)
        return (own,) if self.mismatched is None else (own, self.mismatched)

    @property
    def content(self) -> bytes:
        return super().content + bytes([self.desirable])


def with_mismatched(rows: Sequence[EncodedExample], seed: int, max_seq_len: int) -> EncodedRows:
    """Each row with the answer of another: of the one before it in the order in which the first epoch takes them.

    TRL's definition (answers turned by one within a batch of rows taken in their order) over the whole order, so that
    it depends neither on the size of a step nor on that of a micro-batch.
    """
    order = permutation(len(rows), seed, "epoch 0")
    before = np.empty_like(order)
    before[order] = np.roll(order, 1)

    def complete(number: int, row: EncodedExample) -> EncodedExample:
        assert isinstance(row, JudgedAnswer), row
        other = _with_answer_of(row, rows[int(before[number])])
        return replace(row, mismatched=other.truncate(max_seq_len))

    return ChangedRows(counted(rows), complete)


def _with_answer_of(row: EncodedExample, other: EncodedExample) -> EncodedExample:
    """The prompt of one row and the answer of another, which is all that follows the other's prompt."""
    own, theirs = len(row.prompt_ids), len(other.prompt_ids)
    return EncodedExample(
        torch.cat([row.input_ids[:own], other.input_ids[theirs:]]),
        torch.cat([row.supervised[:own], other.supervised[theirs:]]),
        row.origin,
    )


def to_follow(rows: Sequence[EncodedExample]) -> Sequence[EncodedExample]:
    """Answers to follow: the chosen ones of pairs, and those that are judged to be good (all, where none is). Rows that
    compare nothing are examples to follow as they are.
    """
    if not len(rows) or not isinstance(rows[0], PreferenceRow):
        return rows
    followed = [
        row.documents[0]
        for row in rows
        if isinstance(row, EncodedPair) or (isinstance(row, JudgedAnswer) and row.desirable)
    ]
    return followed or rows


# ---- batches -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class PreferenceBatch(Batch):
    """A micro-batch of documents whose answers' log-probabilities are summed. Of pairs there are two documents each,
    the chosen one first.

    Where prompts are learnt too, `weights` is 1 at the targets of answers and 0 at those of prompts.

    Args:
        target_counts: targets of each document, of all kinds.
        answer_tokens: fp64 `(documents,)`, those of its answer.
        reference: fp64 `(documents,)`, summed log-probabilities of their answers; None where they are not known.
        desirable: bool `(documents,)`, of judged answers.
    """

    target_counts: tuple[int, ...]
    answer_tokens: Tensor
    reference: Tensor | None = None
    desirable: Tensor | None = None

    def sums(self, values: Tensor) -> Tensor:
        """Sums over each document's targets, of values `(N,)` in the order of `supervised_positions`."""
        return torch.stack([part.sum() for part in values.split(self.target_counts)])


def compare(rows: Sequence[PreferenceRow], packed: bool, shares: bool = False) -> PreferenceBatch:
    """One micro-batch of rows of one kind, as `packing.collate`.

    Args:
        shares: what both documents of a pair begin with is there once: the prompt, and more where answers begin alike.
    """
    pairs = [row for row in rows if isinstance(row, EncodedPair)]
    judged = [row for row in rows if isinstance(row, JudgedAnswer)]
    assert (len(pairs) == len(rows)) != (len(judged) == len(rows)), "rows of one kind, and at least one"
    answers = [document for row in pairs for document in row.documents] + [row.documents[0] for row in judged]
    learns_prompt = any(row.learns_prompt for row in pairs)
    learnt = answers
    if learns_prompt:
        learnt = [_as_a_whole(answer) if i % 2 == 0 else answer for i, answer in enumerate(answers)]
    batch = packing.collate(learnt, packed)
    if shares and pairs:
        batch = packing.share_beginnings(batch, [row.shared_tokens for row in pairs])
    known = [row.reference[:2] for row in pairs] + [row.reference[:1] for row in judged]
    weights = (packing.collate(answers, packed).targets != packing.IGNORE).float() if learns_prompt else batch.weights
    return extended(
        batch,
        PreferenceBatch,
        weights=weights,
        target_counts=tuple(document.supervised_tokens for document in learnt),
        answer_tokens=torch.tensor([document.supervised_tokens for document in answers], dtype=torch.float64),
        reference=torch.tensor(sum(known, ()), dtype=torch.float64) if all(known) else None,
        desirable=torch.tensor([row.desirable for row in judged]) if judged else None,
    )


def _as_a_whole(document: EncodedExample) -> EncodedExample:
    return replace(document, supervised=torch.ones_like(document.supervised))
