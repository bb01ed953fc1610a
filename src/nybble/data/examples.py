"""What a training row is, before and after it has been turned into tokens. No reading, no tokenizer here."""

import hashlib
import json
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

Role = Literal["system", "user", "assistant", "tool"]
Kind = TypeVar("Kind")


# What templates call the thinking that stands apart from the answer: DeepSeek and Qwen, gpt-oss, newer ones.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool by the assistant.

    Args:
        arguments: their names and JSON values.
        id: what the call's result refers to.
    """

    name: str
    arguments: dict[str, Any]
    id: str

    def as_json(self) -> str:
        """Name and arguments, the same text for the same call."""
        return json.dumps({"name": self.name, "arguments": self.arguments}, ensure_ascii=False, sort_keys=True)


class Picture(NamedTuple):
    """A picture in a turn.

    Args:
        stored: its file, or its path; empty where the row has it elsewhere.
        digest: SHA-256 of the file.
    """

    stored: bytes | str
    digest: str = ""


class CallForm(NamedTuple):
    """How a template wants to be given tool calls; templates differ, and each takes one of these.

    Args:
        arguments_as_text: as JSON text, not as an object.
        null_content: content is null, not "", beside calls.
        short_ids: ids are nine letters and digits (Mistral).
    """

    arguments_as_text: bool = False
    null_content: bool = False
    short_ids: bool = False

    def id(self, given: str) -> str:
        """The call's id in this form; the same for a call and for its result."""
        if not self.short_ids or (len(given) == 9 and given.isascii() and given.isalnum()):
            return given
        return hashlib.sha256(given.encode()).hexdigest()[:9]


PLAIN_CALLS = CallForm()


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Args:
        reasoning: thinking that its owner keeps apart from the content; "" where there is none.
        weight: how much its owner marked the turn to count in the loss, 0 not at all; None where it bears no mark.
        unread: keys that say something which nybble does not read.
        calls: the tools that an assistant's turn calls, behind its content.
        answers: id of the call that a tool's turn is the result of.
        name: of the tool whose result this is.
        given: characters at the content's beginning that the prompt holds and the turn goes on from; they are context.
        parts: texts and pictures in their order, where there are pictures; `content` is the texts then.
    """

    role: Role
    content: str
    reasoning: str = ""
    weight: float | None = None
    unread: tuple[str, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    answers: str = ""
    name: str = ""
    given: int = 0
    parts: tuple[str | Picture, ...] = ()

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Those among its parts."""
        return tuple(part for part in self.parts if isinstance(part, Picture))

    @property
    def supervised(self) -> bool:
        """Whether the model learns to write this turn."""
        return self.role == "assistant" and self.weight != 0

    def as_dict(self, form: CallForm = PLAIN_CALLS, in_parts: bool = False) -> dict[str, Any]:
        """What a chat template sees. Thinking bears every name that templates have for it.

        Args:
            in_parts: the content is a list in any case, not only where there are pictures.
        """
        told: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.parts or in_parts:
            said = self.parts or (self.content,)
            told["content"] = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in said
            ]
        if self.reasoning:
            told |= dict.fromkeys(REASONING_KEYS, self.reasoning)
        if self.calls:
            if form.null_content and not self.content and not in_parts:
                told["content"] = None
            told["tool_calls"] = [_call_as_dict(call, form) for call in self.calls]
        if self.role == "tool":
            told |= {"tool_call_id": form.id(self.answers), "name": self.name}
        return told

    def said(self) -> list[tuple[str, str]]:
        """(what it is, its text) of all that the turn says."""
        calls = [("call", call.as_json()) for call in self.calls]
        calls += [("picture", picture.digest) for picture in self.pictures]
        return [*([("reasoning", self.reasoning)] if self.reasoning else []), (self.role, self.content), *calls]


def _call_as_dict(call: ToolCall, form: CallForm) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False) if form.arguments_as_text else call.arguments
    return {"id": form.id(call.id), "type": "function", "function": {"name": call.name, "arguments": arguments}}


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
        return "\n".join(text for turn in self.conversation() for _, text in turn.said() if text)

    def last_answer(self) -> str | None:
        """The last turn of the assistant, its calls too; None where there is none."""
        last = next((turn for turn in reversed(self.turns()) if turn.role == "assistant"), None)
        return None if last is None else "\n".join(filter(None, (last.content, *(c.as_json() for c in last.calls))))

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
        return said + [part for turn in self.conversation() for part in turn.said()]


DTYPES = (torch.int32, torch.bool, torch.float32)  # of a sequence's tensors, as they are pickled by number


@dataclass(frozen=True, eq=False)
class EncodedExample:
    """One training sequence.

    Args:
        input_ids: int32 (T,).
        supervised: bool (T,); True where a token belongs to an assistant's turn or is its end-of-turn token.
        origin: the row it came from, "file:line".
        num_truncated: tokens cut off at the end because the row was longer than `max_seq_len`.
        weights: fp32 (T,), how much the loss of each supervised token counts; None where each counts 1.
    """

    input_ids: Tensor
    supervised: Tensor
    origin: str
    num_truncated: int = 0
    weights: Tensor | None = None

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
        return int(np.count_nonzero(self.supervised.numpy()[1:]))

    @property
    def num_targets(self) -> int:
        """Tokens that the loss head predicts."""
        return self.supervised_tokens

    @property
    def document_lengths(self) -> tuple[int, ...]:
        """Tokens of each document that it is to the model: of its one, unless it compares several."""
        return (len(self),)

    @property
    def learnt_documents(self) -> "tuple[EncodedExample, ...]":
        """Those documents, each by itself."""
        return (self,)

    @property
    def shared_tokens(self) -> int:
        """Tokens that two of its documents begin with."""
        return 0

    @property
    def picture_values(self) -> int:
        """Of the tensors that are made of its pictures."""
        return 0

    @property
    def decoded_kib(self) -> int:
        """Of its pictures in red, green and blue."""
        return 0

    @property
    def content(self) -> bytes:
        """All that training learns from it, to tell it from others."""
        weights = b"" if self.weights is None else self.weights.numpy().tobytes()
        return self.input_ids.numpy().tobytes() + self.supervised.numpy().tobytes() + weights

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens before the first supervised one: what chat would send for this row's first answer."""
        return self.input_ids[: self._first_supervised()].tolist()

    @property
    def prompt(self) -> "EncodedExample":
        """The same as a sequence of its own."""
        length = self._first_supervised()
        return replace(self, input_ids=self.input_ids[:length], supervised=self.supervised[:length], weights=None)

    @property
    def answer_ids(self) -> list[int]:
        """The first supervised run of tokens, its end-of-turn token included."""
        start = self._first_supervised()
        rest = self.supervised[start:]
        end = start + (int(rest.int().argmin()) if not bool(rest.all()) else rest.numel())
        return self.input_ids[start:end].tolist()

    def truncate(self, max_seq_len: int) -> Self:
        """The first `max_seq_len` tokens (this very object when it is short enough)."""
        if len(self) <= max_seq_len:
            return self
        cut = len(self) - max_seq_len
        ids, supervised = self.input_ids[:max_seq_len].clone(), self.supervised[:max_seq_len].clone()
        weights = None if self.weights is None else self.weights[:max_seq_len].clone()
        cut += self.num_truncated
        return replace(self, input_ids=ids, supervised=supervised, num_truncated=cut, weights=weights)

    def _first_supervised(self) -> int:
        return int(self.supervised.int().argmax()) if bool(self.supervised.any()) else len(self)


def _unpickled(row: type[EncodedExample], kinds: list[int | None], *packed: Any) -> EncodedExample:
    values: list[Any] = [
        value if kind is None else torch.frombuffer(bytearray(value), dtype=DTYPES[kind])
        for value, kind in zip(packed, kinds, strict=True)
    ]
    return row(*values)


def extended(value: Any, kind: type[Kind], **more: Any) -> Kind:
    """A dataclass's value as one of a subclass.

    Args:
        more: fields that only the subclass has, and those that are to be others.
    """
    return kind(**{field.name: getattr(value, field.name) for field in fields(value)} | more)
