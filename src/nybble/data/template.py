"""ChatTemplate: how conversations become tokens. One code path for training, chat, serving and export.

`encode_prompt` and `encode_example` both render with the tokenizer's own Jinja template (in transformers'
sandbox) and both encode through `TextEncoder.encode_pieces` with cuts at the borders of the assistant's turns,
so the ids before an answer in training are, by construction, the ids chat sends to get that answer.
"""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from nybble.data.chat_templates import FOLD_SYSTEM, TEMPLATES, find_template
from nybble.data.examples import EncodedExample, Example, Message
from nybble.data.limits import TimeIsUpError, limited
from nybble.data.supervision import PROBES, Rendered, Turn, closing_of, find_turns
from nybble.data.text_encoder import RowError, TextEncoder
from nybble.errors import ConfigError, DataError
from nybble.options.groups import RowOptions

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
RENDER_SECONDS, RENDER_BYTES = 2.0, 200_000_000  # of processor time, for one conversation
Tools = Sequence[dict[str, Any]]


def open_template(
    options: RowOptions, tokenizer: PreTrainedTokenizerBase, recorded: Path | None = None
) -> "ChatTemplate":
    """The template that the options choose.

    Args:
        recorded: file of the template that a run was trained with; where it exists, it is the one.

    Raises:
        ConfigError: --chat-template names none.
        DataError: as `ChatTemplate`.
    """
    chosen = options.chat_template
    if recorded is not None and recorded.is_file():
        return ChatTemplate(tokenizer, options.template, recorded.read_text(encoding="utf-8"))
    if chosen is None:
        return ChatTemplate(tokenizer, options.template)
    notice = f"Chat template: {chosen}, in place of the tokenizer's own."
    return ChatTemplate(tokenizer, options.template, find_template(chosen, TextEncoder(tokenizer)), (notice,))


class ChatTemplate:
    """Turns conversations into token ids with a tokenizer's chat template.

    Args:
        tokenizer: a transformers tokenizer; it is read, never changed.
        mode: "auto" uses `chat_template`. "none" uses no template: prompt and completion are bare strings, with bos
            before (where the tokenizer puts one) and eos behind.
        chat_template: Jinja text; the tokenizer's own by default, or the one named plain where it has none.
        notices: what is to be said of `chat_template`.

    Attributes:
        chat_template: the Jinja text in use, to be kept with the adapter and exported; None in mode "none".
        notices: sentences a user should see.
        stop_ids: the ids that end an answer: the template's end-of-turn token and eos.
        folds_system: whether the template refuses system turns, so that their words go before the next user's.

    Raises:
        ConfigError: the mode is unknown, or `chat_template` renders no conversation.
        DataError: the tokenizer has no end-of-sequence token where one is needed.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mode: Literal["auto", "none"] = "auto",
        chat_template: str | None = None,
        notices: tuple[str, ...] = (),
    ):
        if mode not in ("auto", "none"):
            raise ConfigError(f"template: {mode!r}", "allowed: auto, none")
        self.tokenizer = tokenizer
        self.mode = mode
        self.encoder = TextEncoder(tokenizer)
        own = chat_template is None
        self.chat_template, self.notices = self._choose_template() if own else (chat_template, notices)
        self._has_generation_blocks = bool(self.chat_template and GENERATION_BLOCK.search(self.chat_template))
        if self._refuses_system_turns():
            self.chat_template = f"{FOLD_SYSTEM}{self.chat_template}"
        self.folds_system = self.chat_template is not None and self.chat_template.startswith(FOLD_SYSTEM)
        probe, self._closing = self._find_closing(required=not own)
        self.stop_ids = self._find_stop_ids(probe)
        if probe is not None and self._begins_twice(probe):
            self.notices += (
                f"The chat template begins with {self.tokenizer.bos_token} twice; training and chat do so.",
            )

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The text of a conversation. In mode "none": its contents, one after the other.

        Raises:
            jinja2.TemplateError: the template refuses the conversation.
        """
        if self.chat_template is None:
            return "".join(message.content for message in messages)
        return self._render(messages, add_generation_prompt).text

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids that chat and serving send for a conversation that ends in a user's turn.

        Raises:
            DataError: the template refuses the conversation.
        """
        try:
            if self.chat_template is None:
                return self.encode_text(self.render(messages, True))
            text, generated = whole = self._render(messages, True)
            cuts = _cuts([turn for turn in self._find_turns(messages, whole) if turn.stands_in(text)], generated)
        except TemplateError as error:
            raise DataError(f"the chat template refuses this conversation: {error}") from error
        return _flatten(self.encoder.encode_pieces(text, cuts))

    def encode_text(self, text: str) -> list[int]:
        """The ids of bare text to go on with: bos before it where the tokenizer puts one, and never a second."""
        return self._after_bos(self.encoder.encode(text))

    def encode_example(self, example: Example) -> list[EncodedExample]:
        """The training sequences of a row, untruncated.

        One sequence a row, except where the template words earlier turns differently once the conversation
        goes on: such a turn gets a sequence of its own that ends with it, as chat would have produced it.

        Raises:
            RowError: the row cannot be trained on; its `finding` says why.
        """
        try:
            if example.text is not None:
                return [self._encode_bare(example.origin, "", example.text)]
            if self.chat_template is None and example.prompt is not None and example.completion is not None:
                if example.tools:
                    raise RowError("template-loses-content", example.origin, "bare strings have no place for its tools")
                return [self._encode_bare(example.origin, example.prompt, example.completion)]
            return self._encode_conversation(example.origin, example.conversation(), example.tools)
        except TemplateError as error:
            raise RowError("template-refuses", example.origin, f"the chat template refuses it: {error}") from error
        except RowError as error:
            raise RowError(error.finding, example.origin, error.detail) from error

    def _encode_bare(self, origin: str, context: str, answer: str) -> EncodedExample:
        """bos + context + answer + eos, the answer and eos supervised. A begin or an end that the row spells itself
        gets no second one, and what follows its end is not supervised."""
        eos_id = self._required_eos()
        if not answer.strip():
            raise RowError("empty-answer", origin, "the text to train on is empty")
        said = answer.rstrip()
        closed = said.endswith(tuple(self.tokenizer.convert_ids_to_tokens(list(self.stop_ids))))
        end = len(context) + len(said if closed else answer)
        before, after, rest = self.encoder.encode_pieces(context + answer, [len(context), end])
        if before:
            before = self._after_bos(before)
        elif after[:1] != self._bos():
            before = self._bos()
        eos = [] if closed else [eos_id]
        return _encoded(origin, [(before, False), ([*after, *eos], True), (rest, False)])

    def _encode_conversation(self, origin: str, messages: Sequence[Message], tools: Tools) -> list[EncodedExample]:
        _check_turns(origin, messages)
        if self.chat_template is None:
            raise RowError("needs-template", origin, "a row of messages needs a chat template")
        whole = self._render(messages, False, tools)
        if tools and whole == self._render(messages, False):
            raise RowError("template-loses-content", origin, "the chat template has no place for the row's tools")
        turns = self._find_turns(messages, whole, tools)
        learnt = [turn for turn in turns if messages[turn.index].supervised]
        unprompted = [turn.index + 1 for turn in learnt if not turn.prompted]
        if unprompted:
            detail = f"the template words message {unprompted[0]} so that it does not follow chat's prompt"
            raise RowError("template-rewrites-prompt", origin, detail)
        standing = [turn for turn in learnt if turn.stands_in(whole.text)]
        sequences = [
            self._encode_turns(origin, messages[: turn.index + 1], turn.rendered, turns, [turn])
            for turn in learnt
            if turn not in standing
        ]
        if standing:
            sequences.append(self._encode_turns(origin, messages, whole, turns, standing))
        return sequences

    def _encode_turns(
        self, origin: str, messages: Sequence[Message], rendered: Rendered, turns: list[Turn], supervised: list[Turn]
    ) -> EncodedExample:
        """Tokens of rendered messages, cut at all `turns` that stand in them, of which only `supervised` are trained
        on."""
        text, generated = rendered
        _check_content(origin, messages, text, {turn.index for turn in supervised})
        spans = [(start, t.end) for t in supervised if (start := t.supervised_start(generated)) is not None]
        cuts = _cuts([turn for turn in turns if turn.index < len(messages) and turn.stands_in(text)], generated)
        pieces = self.encoder.encode_pieces(text, cuts)
        trained = [any(start <= cut < end for start, end in spans) for cut in (0, *cuts)]
        return _encoded(origin, list(zip(pieces, trained, strict=True)))

    def _find_turns(self, messages: Sequence[Message], whole: Rendered, tools: Tools = ()) -> list[Turn]:
        render = partial(self._render, tools=tools)
        return find_turns(messages, whole, render, self._closing, self.encoder.special_tokens)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, tools: Tools = ()) -> Rendered:
        """
        Raises:
            jinja2.TemplateError: the template refuses the conversation, or does something wrong.
            DataError: it takes too long or too much.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # annotated as returning a string; it returns texts and spans
        try:
            with limited(RENDER_SECONDS, RENDER_BYTES):
                texts, spans = render(
                    conversations=[[message.as_dict() for message in messages]],
                    tools=list(tools) or None,
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
                "Use a tokenizer from a source you trust, another --chat-template, or --template none.",
            ) from error
        except Exception as error:  # a template is code: what it does wrong can raise anything
            raise TemplateError(f"{type(error).__name__}: {error}") from error
        return Rendered(texts[0], tuple(spans[0]) if self._has_generation_blocks else None)

    def _after_bos(self, ids: list[int]) -> list[int]:
        bos = self._bos()
        return ids if ids[:1] == bos else [*bos, *ids]

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
                f"answers ending in {self.tokenizer.eos_token}. Choose another with --chat-template, or use "
                "--template none for bare text."
            )
            return TEMPLATES["plain"].jinja(bos=self.encoder.leading_bos is not None), (notice,)
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

    def _refuses_system_turns(self) -> bool:
        """Whether the template renders a conversation, and refuses it as soon as a system turn stands before it."""
        without, with_system = PROBES
        return (
            self.chat_template is not None and self._refusal(without) is None and self._refusal(with_system) is not None
        )

    def _refusal(self, messages: Sequence[Message]) -> Exception | None:
        """What the template says to a conversation that it does not take."""
        try:
            self._render(messages, False)
        except TemplateError as error:
            return error
        return None

    def _find_closing(self, required: bool) -> tuple[tuple[Message, ...] | None, str | None]:
        """A conversation that the template takes, and what it adds behind the answer; nothing where it takes none of
        the probes. (It may want another kind of conversation.)

        Raises:
            ConfigError: there is none, and `required`.
        """
        for probe in PROBES if self.chat_template is not None else ():
            if self._refusal(probe) is None and (closing := closing_of(self._render, probe)) is not None:
                return probe, closing
        if required and self.chat_template is not None:
            why = self._refusal(PROBES[0]) or "its words are missing"
            raise ConfigError(
                f"chat-template: it renders no answer to a user: {why}.",
                "Needed: a Jinja template that writes down `messages`, each with `role` and `content`.",
                "Mend the template, or name another with --chat-template.",
            )
        return None, None

    def _begins_twice(self, probe: Sequence[Message]) -> bool:
        bos = self.tokenizer.bos_token
        return bool(bos) and self.render(probe, False).startswith(2 * bos)

    def _find_stop_ids(self, probe: tuple[Message, ...] | None) -> tuple[int, ...]:
        """The last supervised token of an answer to a conversation of one word, and eos."""
        stops = [] if self.encoder.eos_id is None else [self.encoder.eos_id]
        if probe is None:
            return tuple(stops)
        text, _ = whole = self._render(probe, False)
        [turn] = self._find_turns(probe, whole)
        if turn.closed:
            token = self.encoder.encode_pieces(text, [turn.start, turn.end])[1][-1]
            stops = [token, *(stop for stop in stops if stop != token)]
        return tuple(stops)


def _check_turns(origin: str, messages: Sequence[Message]) -> None:
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise RowError("no-assistant-turn", origin, "no assistant turn, so nothing to train on")
    if "user" not in roles[: len(roles) - roles[::-1].index("assistant")]:
        raise RowError("no-user-turn", origin, "only an assistant turn: no user turn before it to answer")
    learnt = [message for message in messages if message.supervised]
    if not learnt:
        raise RowError("nothing-to-learn", origin, "each of its assistant turns is marked as not to be learnt")
    if not any(message.content.strip() for message in learnt):
        raise RowError("empty-answer", origin, "the assistant's turn is empty")


def _check_content(origin: str, messages: Sequence[Message], text: str, trained: set[int]) -> None:
    """Every message must stand in the text, white space aside, and each at a place of its own; answers that are not
    trained on here may have been shortened by the template."""
    needed = [
        (_squeeze(words), what, index)
        for index, message in enumerate(messages)
        if message.role != "assistant" or index in trained
        for what, words in (("message", message.content), ("the thinking of message", message.reasoning))
    ]
    rest = _squeeze(text)
    for words, what, index in sorted(needed, key=lambda each: -len(each[0])):  # a short text may stand in a long one
        before, found, after = rest.partition(words) if words else (rest, words, "")
        if found != words:
            detail = f"the template leaves out (part of) {what} {index + 1}, by {messages[index].role}"
            raise RowError("template-loses-content", origin, detail)
        rest = f"{before}\0{after}" if words else rest


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _cuts(turns: list[Turn], generated: Sequence[tuple[int, int]] | None) -> list[int]:
    """Where a rendered text is cut: every place that may be a border between supervised and other tokens. Chat cuts
    its history at the same places as training does, so both get the same tokens."""
    starts = {start for turn in turns if (start := turn.supervised_start(generated)) is not None}
    return sorted(starts.union(*({turn.start, turn.end} for turn in turns)))


def _flatten(pieces: list[list[int]]) -> list[int]:
    return [token for piece in pieces for token in piece]


def _encoded(origin: str, pieces: Sequence[tuple[list[int], bool]]) -> EncodedExample:
    ids = _flatten([piece for piece, _ in pieces])
    supervised = [trained for piece, trained in pieces for _ in piece]
    return EncodedExample(torch.tensor(ids, dtype=torch.int32), torch.tensor(supervised, dtype=torch.bool), origin)
