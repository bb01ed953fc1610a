"""ChatTemplate: how conversations become tokens. One code path for training, chat, serving and export.

`encode_prompt` and `encode_example` both render with the tokenizer's own Jinja template (in transformers'
sandbox) and both encode through `TextEncoder.encode_pieces` with cuts at the borders of the assistant's turns,
so the ids before an answer in training are, by construction, the ids chat sends to get that answer.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from nybble.data.examples import EncodedExample, Example, Message
from nybble.data.limits import TimeIsUpError, limited
from nybble.data.supervision import Turn, Turns, locate_turns, supervised_start
from nybble.data.text_encoder import RowError, TextEncoder
from nybble.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For tokenizers without a chat template (base models). Plain headings that any vocabulary can spell; the only
# special tokens are the ones every such tokenizer has: bos where it puts one itself, and eos at the end of a turn.
FALLBACK_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{{ eos_token + '\\n' if message['role'] == 'assistant' else '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
RENDER_SECONDS, RENDER_BYTES = 2.0, 200_000_000  # of processor time, for one conversation
Span = tuple[int, int]


class ChatTemplate:
    """Turns conversations into token ids with a tokenizer's chat template.

    Args:
        tokenizer: a transformers tokenizer; it is read, never changed.
        mode: "auto" uses the tokenizer's chat template, or `FALLBACK_TEMPLATE` where it has none. "none" uses no
            template: prompt and completion are bare strings, with bos before (where the tokenizer puts one) and
            eos behind.

    Attributes:
        chat_template: the Jinja text in use, to be kept with the adapter and exported; None in mode "none".
        notices: sentences a user should see.
        stop_ids: the ids that end an answer: the template's end-of-turn token and eos.

    Raises:
        ConfigError: the mode is unknown.
        DataError: the tokenizer has no end-of-sequence token where one is needed.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", mode: Literal["auto", "none"] = "auto"):
        if mode not in ("auto", "none"):
            raise ConfigError(f"template: {mode!r}", "allowed: auto, none")
        self.tokenizer = tokenizer
        self.mode = mode
        self.encoder = TextEncoder(tokenizer)
        self.chat_template, self.notices = self._choose_template()
        self._has_generation_blocks = bool(self.chat_template and GENERATION_BLOCK.search(self.chat_template))
        self.stop_ids = self._find_stop_ids()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The text of a conversation. In mode "none": its contents, one after the other.

        Raises:
            jinja2.TemplateError: the template refuses the conversation.
        """
        if self.chat_template is None:
            return "".join(message.content for message in messages)
        return self._render(messages, add_generation_prompt)[0]

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids that chat and serving send for a conversation that ends in a user's turn.

        Raises:
            DataError: the template refuses the conversation.
        """
        from jinja2 import TemplateError

        try:
            if self.chat_template is None:
                return [*self._bos(), *self.encoder.encode(self.render(messages, True))]
            text, generated = self._render(messages, True)
            cuts = _cuts(self._locate(messages, text).found, generated)
        except TemplateError as error:
            raise DataError(f"the chat template refuses this conversation: {error}") from error
        return _flatten(self.encoder.encode_pieces(text, cuts))

    def encode_example(self, example: Example) -> list[EncodedExample]:
        """The training sequences of a row, untruncated.

        One sequence a row, except where the template words earlier turns differently once the conversation
        goes on: such a turn gets a sequence of its own that ends with it, as chat would have produced it.

        Raises:
            RowError: the row cannot be trained on; its `finding` says why.
        """
        from jinja2 import TemplateError

        try:
            if example.text is not None:
                return [self._encode_bare(example.origin, "", example.text)]
            if self.chat_template is None and example.prompt is not None and example.completion is not None:
                return [self._encode_bare(example.origin, example.prompt, example.completion)]
            return self._encode_conversation(example.origin, example.conversation())
        except TemplateError as error:
            raise RowError("template-refuses", example.origin, f"the chat template refuses it: {error}") from error
        except RowError as error:
            raise RowError(error.finding, example.origin, error.detail) from error

    def _encode_bare(self, origin: str, context: str, answer: str) -> EncodedExample:
        """bos + context + answer + eos, the answer and eos supervised."""
        eos_id = self._required_eos()
        if not answer.strip():
            raise RowError("empty-answer", origin, "the text to train on is empty")
        before, after = self.encoder.encode_pieces(context + answer, [len(context)])
        return _encoded(origin, [([*self._bos(), *before], False), ([*after, eos_id], True)])

    def _encode_conversation(self, origin: str, messages: Sequence[Message]) -> list[EncodedExample]:
        _check_turns(origin, messages)
        if self.chat_template is None:
            raise RowError("needs-template", origin, "a row of messages needs a chat template")
        text, generated = self._render(messages, False)
        turns = self._locate(messages, text)
        if turns.unprompted:
            detail = f"the template words message {turns.unprompted[0] + 1} so that it does not follow chat's prompt"
            raise RowError("template-rewrites-prompt", origin, detail)
        sequences = []
        for index in turns.rewritten:
            sequences += self._encode_last_turn(origin, messages[: index + 1])
        if turns.found:
            _check_content(origin, messages, text, {turn.index for turn in turns.found})
            sequences.append(self._encode_turns(origin, text, turns.found, generated, turns.found))
        return sequences

    def _encode_last_turn(self, origin: str, messages: Sequence[Message]) -> list[EncodedExample]:
        text, generated = self._render(messages, False)
        turns = self._locate(messages, text).found
        _check_content(origin, messages, text, {turns[-1].index})
        return [self._encode_turns(origin, text, turns, generated, turns[-1:])]

    def _encode_turns(
        self, origin: str, text: str, turns: list[Turn], generated: list[Span] | None, supervised: list[Turn]
    ) -> EncodedExample:
        """Tokens of a rendered text, cut at all its `turns`, of which only `supervised` are trained on."""
        spans = [(start, t.end) for t in supervised if (start := supervised_start(t, generated)) is not None]
        cuts = _cuts(turns, generated)
        pieces = self.encoder.encode_pieces(text, cuts)
        trained = [any(start <= cut < end for start, end in spans) for cut in (0, *cuts)]
        return _encoded(origin, list(zip(pieces, trained, strict=True)))

    def _locate(self, messages: Sequence[Message], text: str) -> Turns:
        return locate_turns(messages, text, self.render, self.encoder.special_tokens)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> tuple[str, list[Span] | None]:
        """The text, and the character spans of its {% generation %} blocks where the template has them.

        Raises:
            jinja2.TemplateError: the template refuses the conversation, or does something wrong.
            DataError: it takes too long or too much.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # annotated as returning a string; it returns texts and spans
        try:
            with limited(RENDER_SECONDS, RENDER_BYTES):
                texts, spans = render(
                    conversations=[[message.as_dict() for message in messages]],
                    chat_template=self.chat_template,
                    add_generation_prompt=add_generation_prompt,
                    return_assistant_tokens_mask=self._has_generation_blocks,
                    **self.tokenizer.special_tokens_map,
                )
        except TemplateError:
            raise
        except (TimeIsUpError, MemoryError) as error:
            what = (
                f"{RENDER_SECONDS} s" if isinstance(error, TimeIsUpError) else f"{RENDER_BYTES // 10**6} MB of memory"
            )
            raise DataError(
                f"The chat template takes more than {what} for one conversation.",
                "A template writes a conversation down, which takes milliseconds.",
                "Use a tokenizer from a source you trust, or --template none.",
            ) from error
        except Exception as error:  # a template is code: what it does wrong can raise anything
            raise TemplateError(f"{type(error).__name__}: {error}") from error
        return texts[0], spans[0] if self._has_generation_blocks else None

    def _bos(self) -> list[int]:
        """The ids before a bare text. (Rendered text spells its own bos, or has none.)"""
        return [] if self.encoder.leading_bos is None else [self.encoder.leading_bos]

    def _choose_template(self) -> tuple[str | None, tuple[str, ...]]:
        if self.mode == "none":
            return None, ()
        if not self.tokenizer.chat_template:
            self._required_eos()
            notice = (
                "The tokenizer has no chat template; nybble's own is used: '### User:' and '### Assistant:' headings, "
                f"answers ending in {self.tokenizer.eos_token}. Use --template none for bare text."
            )
            return ("{{ bos_token }}" if self.encoder.leading_bos is not None else "") + FALLBACK_TEMPLATE, (notice,)
        try:
            template = self.tokenizer.get_chat_template()
        except ValueError as error:  # several, none of them the default
            raise DataError(f"The tokenizer's chat template cannot be chosen: {error}") from error
        dated = "The chat template writes today's date into each prompt: tokens depend on the day."
        return template, (dated,) if "strftime_now" in template else ()

    def _required_eos(self) -> int:
        if self.encoder.eos_id is None:
            got = "the tokenizer has no end-of-sequence token, so an answer could never end"
            raise DataError(got, fix='set "eos_token" in its tokenizer_config.json')
        return self.encoder.eos_id

    def _find_stop_ids(self) -> tuple[int, ...]:
        """eos, and the last supervised token of a conversation of two words."""
        from jinja2 import TemplateError

        stops = [] if self.encoder.eos_id is None else [self.encoder.eos_id]
        probe = (Message("user", "a"), Message("assistant", "b"))
        try:
            text = self.render(probe, False)
            turns = self._locate(probe, text).found
        except TemplateError:  # a template that wants another kind of conversation: only eos is known to end a turn
            return tuple(stops)
        if self.chat_template is not None and turns and turns[0].closed:
            token = self.encoder.encode_pieces(text, [turns[0].start, turns[0].end])[1][-1]
            stops = [token, *(stop for stop in stops if stop != token)]
        return tuple(stops)


def _check_turns(origin: str, messages: Sequence[Message]) -> None:
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise RowError("no-assistant-turn", origin, "no assistant turn, so nothing to train on")
    if "user" not in roles[: len(roles) - roles[::-1].index("assistant")]:
        raise RowError("no-user-turn", origin, "only an assistant turn: no user turn before it to answer")
    if not any(message.content.strip() for message in messages if message.role == "assistant"):
        raise RowError("empty-answer", origin, "the assistant's turn is empty")


def _check_content(origin: str, messages: Sequence[Message], text: str, trained: set[int]) -> None:
    """Every message must stand in the text, white space aside; earlier answers that are not trained on here may
    have been shortened by the template."""
    squeezed = "".join(text.split())
    for index, message in enumerate(messages):
        if message.role == "assistant" and index not in trained:
            continue
        if "".join(message.content.split()) not in squeezed:
            detail = f"the template leaves out (part of) message {index + 1}, by {message.role}"
            raise RowError("template-loses-content", origin, detail)


def _cuts(turns: list[Turn], generated: list[Span] | None) -> list[int]:
    """Where a rendered text is cut: every place that may be a border between supervised and other tokens. Chat cuts
    its history at the same places as training does, so both get the same tokens."""
    starts = {start for turn in turns if (start := supervised_start(turn, generated)) is not None}
    return sorted(starts.union(*({turn.start, turn.end} for turn in turns)))


def _flatten(pieces: list[list[int]]) -> list[int]:
    return [token for piece in pieces for token in piece]


def _encoded(origin: str, pieces: Sequence[tuple[list[int], bool]]) -> EncodedExample:
    ids = _flatten([piece for piece, _ in pieces])
    supervised = [trained for piece, trained in pieces for _ in piece]
    return EncodedExample(torch.tensor(ids, dtype=torch.int32), torch.tensor(supervised, dtype=torch.bool), origin)
