"""Rows of a prompt and its answer as tokens: an encoder reads the one, a decoder learns to write the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad as pad_tensor

from nybble.data.examples import EncodedExample, extended
from nybble.data.packing import IGNORE, Batch, pad


@dataclass(frozen=True, eq=False)
class PromptedRow(EncodedExample):
    """A prompt's tokens, and behind them its answer's, which are supervised.

    Args:
        prompt_tokens: how many are the prompt's.
        kept_tokens: of those, how many at its end are never cut off: what the tokenizer adds behind texts.
    """

    prompt_tokens: int = 0
    kept_tokens: int = 0

    @classmethod
    def of(cls, prompt: Sequence[int], answer: Sequence[int], origin: str, kept_tokens: int = 0) -> Self:
        """The row of these tokens, all of the answer's supervised."""
        ids = torch.tensor([*prompt, *answer], dtype=torch.int32)
        supervised = torch.arange(len(ids)) >= len(prompt)
        return cls(ids, supervised, origin, prompt_tokens=len(prompt), kept_tokens=kept_tokens)

    @property
    def encoder_ids(self) -> Tensor:
        """int32: what the encoder reads."""
        return self.input_ids[: self.prompt_tokens]

    @property
    def label_ids(self) -> Tensor:
        """int32: what the decoder is to write."""
        return self.input_ids[self.prompt_tokens :]

    @property
    def supervised_tokens(self) -> int:
        """All that are supervised: the decoder begins with a token of its own, which the first is predicted from."""
        return int(np.count_nonzero(self.supervised.numpy()))

    @property
    def prompt_ids(self) -> list[int]:
        return self.encoder_ids.tolist()

    @property
    def answer_ids(self) -> list[int]:
        return self.label_ids.tolist()

    @property
    def document_lengths(self) -> tuple[int, ...]:
        """The prompt's and the answer's: each is padded by itself."""
        return self.prompt_tokens, len(self) - self.prompt_tokens

    @property
    def content(self) -> bytes:
        return super().content + repr(self.prompt_tokens).encode()

    def truncate(self, max_seq_len: int) -> Self:
        """Prompt and answer with at most so many tokens each: the prompt loses words at its end, and keeps the tokens
        that the tokenizer adds; the answer loses its end, that it ends there is not learnt then.
        """
        prompt, answer = self.document_lengths
        if max(prompt, answer) <= max_seq_len:
            return self
        places = torch.arange(len(self))
        kept = min(self.kept_tokens, max_seq_len)
        words = min(prompt - self.kept_tokens, max_seq_len - kept)
        of_prompt = torch.cat([places[:words], places[prompt - kept : prompt]])
        left = torch.cat([of_prompt, places[prompt : prompt + max_seq_len]])
        return replace(
            self,
            input_ids=self.input_ids[left],
            supervised=self.supervised[left],
            num_truncated=self.num_truncated + len(self) - len(left),
            prompt_tokens=len(of_prompt),
        )


# ---- batches -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class PromptedBatch(Batch):
    """A micro-batch of prompts, `input_ids` and `attention_mask` (B, T), and of answers, `targets` (B, A).

    Args:
        decoder_input_ids: int64 (B, A), what the decoder is given to predict each target from.
        answer_lengths: tokens of each answer.
    """

    decoder_input_ids: Tensor
    answer_lengths: tuple[int, ...]


def collate_prompted(rows: Sequence[PromptedRow], pad_id: int, shifted: Callable[[Tensor], Tensor]) -> PromptedBatch:
    """One micro-batch, prompts padded and answers padded.

    Args:
        pad_id: what fills prompts up.
        shifted: what the model's decoder is given for labels, int64 (B, A), IGNORE behind each answer.
    """
    unsupervised = [torch.zeros(row.prompt_tokens, dtype=torch.bool) for row in rows]
    prompts = [EncodedExample(row.encoder_ids, none, row.origin) for row, none in zip(rows, unsupervised, strict=True)]
    lengths = tuple(len(row.label_ids) for row in rows)
    labels, targets = (
        torch.stack([pad_tensor(each, (0, max(lengths) - len(each)), value=IGNORE) for each in answers])
        for answers in (
            [row.label_ids.long() for row in rows],
            [row.label_ids.long().masked_fill(~row.supervised[row.prompt_tokens :], IGNORE) for row in rows],
        )
    )
    return extended(
        pad(prompts, pad_id),
        PromptedBatch,
        targets=targets,
        document_lengths=tuple(map(len, rows)),
        supervised_tokens=int((targets != IGNORE).sum()),
        decoder_input_ids=shifted(labels),
        answer_lengths=lengths,
    )
