"""What a training row is, before and after it has been turned into tokens. No reading, no tokenizer here."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

Role = Literal["system", "user", "assistant"]


# What templates call the thinking that stands apart from the answer: DeepSeek and Qwen, gpt-oss, newer ones.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Args:
        reasoning: thinking that its owner keeps apart from the content; "" where there is none.
        learnt: whether its owner marked the turn as to be learnt; None where it bears no mark.
        unread: keys that say something which nybble does not read.
    """

    role: Role
    content: str
    reasoning: str = ""
    learnt: bool | None = None
    unread: tuple[str, ...] = ()

    @property
    def supervised(self) -> bool:
        """Whether the model learns to write this turn."""
        return self.role == "assistant" and self.learnt is not False

    def as_dict(self) -> dict[str, str]:
        """What a chat template sees. Thinking bears every name that templates have for it."""
        named = dict.fromkeys(REASONING_KEYS, self.reasoning) if self.reasoning else {}
        return {"role": self.role, "content": self.content, **named}


@dataclass(frozen=True)
class Example:
    """One row as its owner wrote it: a conversation, a prompt with its completion, or bare text.

    Exactly one of the three forms is set. `prompt`/`completion` stay apart from `messages` because
    `--template none` trains them as bare strings.

    Args:
        origin: where the row stands, "train.jsonl:17" (1-based line, or row where a format has no lines).
        tools: JSON schemas of the tools that the row's conversation was held with, for the template to describe.
    """

    origin: str
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    tools: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        assert (self.prompt is None) == (self.completion is None), self.origin
        forms = (self.messages is not None, self.prompt is not None, self.text is not None)
        assert sum(forms) == 1, f"{self.origin}: exactly one form, got {forms}"

    def conversation(self) -> tuple[Message, ...]:
        """The row as turns; a prompt and its completion become a user and an assistant turn."""
        if self.messages is not None:
            return self.messages
        assert self.prompt is not None and self.completion is not None, "a text row has no turns"
        return (Message("user", self.prompt), Message("assistant", self.completion))

    def turns(self) -> tuple[Message, ...]:
        """The row as turns; none where it is bare text."""
        return () if self.text is not None else self.conversation()

    def full_text(self) -> str:
        """All that the row says, a line a turn."""
        if self.text is not None:
            return self.text
        return "\n".join(part for turn in self.conversation() for part in (turn.reasoning, turn.content) if part)

    def last_answer(self) -> str | None:
        """The last turn of the assistant; None where there is none."""
        return next((turn.content for turn in reversed(self.turns()) if turn.role == "assistant"), None)

    @cached_property
    def content_key(self) -> str:
        """A hash that two rows share when they say the same, whatever their white space and format."""
        turns = [("text", self.text)] if self.text is not None else self._said()
        digest = hashlib.sha256()
        for role, content in turns:
            digest.update(f"{role}\0{' '.join(content.split())}\0".encode())
        return digest.hexdigest()

    def _said(self) -> list[tuple[str, str]]:
        """(what it is, its text) of all that a conversation says."""
        said = [("tools", json.dumps(self.tools, sort_keys=True))] if self.tools else []
        for turn in self.conversation():
            said += [("reasoning", turn.reasoning)] if turn.reasoning else []
            said.append((turn.role, turn.content))
        return said


DTYPES = (torch.int32, torch.bool, torch.float32)  # of a sequence's tensors, as they are pickled by number


@dataclass(frozen=True, eq=False)
class EncodedExample:
    """One training sequence.

    Args:
        input_ids: int32 (T,).
        supervised: bool (T,); True where a token belongs to an assistant's turn or is its end-of-turn token.
        origin: the row it came from, "file:line".
        num_truncated: tokens cut off at the end because the row was longer than `max_seq_len`.
    """

    input_ids: Tensor
    supervised: Tensor
    origin: str
    num_truncated: int = 0

    def __post_init__(self) -> None:
        assert self.input_ids.dtype == torch.int32 and self.supervised.dtype == torch.bool, self.origin
        assert self.input_ids.ndim == 1 and self.input_ids.shape == self.supervised.shape, self.origin

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with its tensors as their bytes, which takes less time and room than they do by themselves."""
        values = vars(self).values()  # in the order of the fields
        kinds = [DTYPES.index(value.dtype) if isinstance(value, Tensor) else None for value in values]
        packed = (value if kind is None else value.numpy().tobytes() for value, kind in zip(values, kinds, strict=True))
        return _unpickled, (type(self), kinds, *packed)

    def __len__(self) -> int:
        return self.input_ids.numel()

    @property
    def supervised_tokens(self) -> int:
        """Supervised *targets*: the first token of a sequence is predicted by nothing and does not count."""
        return int(self.supervised[1:].sum())

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens before the first supervised one: what chat would send for this row's first answer."""
        return self.input_ids[: self._first_supervised()].tolist()

    @property
    def answer_ids(self) -> list[int]:
        """The first supervised run of tokens, its end-of-turn token included."""
        start = self._first_supervised()
        rest = self.supervised[start:]
        end = start + (int(rest.int().argmin()) if not bool(rest.all()) else rest.numel())
        return self.input_ids[start:end].tolist()

    def truncate(self, max_seq_len: int) -> "EncodedExample":
        """The first `max_seq_len` tokens (this very object when it is short enough)."""
        if len(self) <= max_seq_len:
            return self
        cut = len(self) - max_seq_len
        ids, supervised = self.input_ids[:max_seq_len].clone(), self.supervised[:max_seq_len].clone()
        return EncodedExample(ids, supervised, self.origin, self.num_truncated + cut)

    def _first_supervised(self) -> int:
        return int(self.supervised.int().argmax()) if bool(self.supervised.any()) else len(self)


def _unpickled(row: type[EncodedExample], kinds: list[int | None], *packed: Any) -> EncodedExample:
    values: list[Any] = [
        value if kind is None else torch.frombuffer(bytearray(value), dtype=DTYPES[kind])
        for value, kind in zip(packed, kinds, strict=True)
    ]
    return row(*values)
