"""Prompts and their answers, as an encoder-decoder's tokenizer writes them: `tokenizer(prompt)` for the encoder,
`tokenizer(text_target=answer)` for the decoder, with an end of sequence behind the answer. No chat template has a part
in it.
"""

from collections.abc import Sequence
from typing import Any

from nybble.data.examples import EncodedExample, Example, Message
from nybble.data.prepare import RowKind
from nybble.data.prompted_rows import PromptedRow
from nybble.data.readers import EXAMPLES
from nybble.data.template import ChatTemplate
from nybble.data.text_encoder import RowError
from nybble.errors import DataError

TURNS = "needed are a user's turn and the assistant's answer, since an encoder-decoder answers one prompt"


class PromptTemplate(ChatTemplate):
    """What an encoder-decoder reads of a conversation: its one turn, the user's, as its tokenizer writes it."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer, "none")
        self._required_eos()

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """The ids that the encoder is given.

        Raises:
            DataError: there is more than one turn, or tools.
        """
        roles = [message.role for message in messages]
        if roles != ["user"] or tools:
            raise DataError(
                f"a conversation of {', '.join(roles)}{', with tools' if tools else ''}",
                "an encoder-decoder answers one prompt, without a system message, earlier turns or tools",
                "write all of it into the prompt",
            )
        return encode_prompt(self.tokenizer, messages[0].content)[0]


def encode_prompt(tokenizer: Any, prompt: str) -> tuple[list[int], int]:
    """The tokens that the encoder reads, and how many of the last the tokenizer added."""
    found = tokenizer(prompt, return_special_tokens_mask=True, verbose=False)
    return found["input_ids"], _added_behind(found["special_tokens_mask"])


def encode_answer(tokenizer: Any, answer: str) -> list[int]:
    """The tokens that the decoder writes, an end of sequence among those behind the text."""
    found = tokenizer(text_target=answer, return_special_tokens_mask=True, verbose=False)
    ids: list[int] = found["input_ids"]
    added = _added_behind(found["special_tokens_mask"])
    ended = tokenizer.eos_token_id in ids[len(ids) - added :]
    return ids if ended else [*ids, tokenizer.eos_token_id]


def _added_behind(special: Sequence[int]) -> int:
    return next((count for count, each in enumerate(reversed(special)) if not each), len(special))


def encode_prompted(template: ChatTemplate, example: Example) -> list[EncodedExample]:
    """The row of a prompt and its answer, untruncated."""
    prompt, answer = _said(example)
    if not prompt.strip():
        raise RowError("empty-prompt", example.origin, "there is nothing that the encoder could read")
    if not answer.strip():
        raise RowError("empty-answer", example.origin, "the answer is empty")
    read, kept = encode_prompt(template.tokenizer, prompt)
    return [PromptedRow.of(read, encode_answer(template.tokenizer, answer), example.origin, kept)]


def _said(example: Example) -> tuple[str, str]:
    """The prompt and the answer of a row.

    Raises:
        RowError: it is none of one prompt and one answer.
    """
    origin = example.origin
    if example.text is not None:
        raise RowError("not-one-prompt", origin, f"bare text; {TURNS}")
    if example.tools:
        raise RowError("not-one-prompt", origin, "tools, which only chat templates write down")
    turns = example.conversation()
    if [turn.role for turn in turns] != ["user", "assistant"]:
        raise RowError("not-one-prompt", origin, f"turns of {', '.join(turn.role for turn in turns)}; {TURNS}")
    prompt, answer = turns
    if prompt.pictures:
        raise RowError("pictures-unread", origin, f"{len(prompt.pictures)} pictures in its prompt")
    if answer.calls or answer.reasoning or answer.weight not in (None, 1) or prompt.weight is not None:
        raise RowError("not-one-prompt", origin, "tool calls, thinking in a key of its own, or a weight")
    return prompt.content, answer.content


PROMPTED_ROWS = RowKind(EXAMPLES, encode_prompted, several="", documents=2, conversations=False)
