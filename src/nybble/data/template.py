"""ChatTemplate: how conversations become tokens. One code path for training, chat, serving and export.

`encode_prompt` and `encode_example` both render with the tokenizer's own Jinja template (in transformers'
sandbox) and both encode through `TextEncoder.encode_pieces` with cuts at the borders of the assistant's turns,
so the ids before an answer in training are, by construction, the ids chat sends to get that answer.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from nybble.data.answer_forms import NO_FORM, AnswerForm, find_answer_form
from nybble.data.chat_templates import FOLD_SYSTEM, TEMPLATES
from nybble.data.content_check import check_content, check_tools, check_turns
from nybble.data.examples import PLAIN_CALLS, CallForm, EncodedExample, Example, Message
from nybble.data.limits import TimeIsUpError, limited
from nybble.data.picture_reader import PictureReader
from nybble.data.supervision import PROBES, Learnt, Rendered, Turn, closing_of, empty_thought_of, find_turns
from nybble.data.template_probes import CALLING, find_call_form, next_openings, shows_thinking
from nybble.data.text_encoder import RowError, TextEncoder
from nybble.data.thinking import keep_thoughts, thought_in_key
from nybble.errors import ConfigError, DataError

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
RENDER_SECONDS, RENDER_BYTES = 2.0, 200_000_000  # of processor time, for one conversation
Tools = Sequence[dict[str, Any]]


class ChatTemplate:
    """Turns conversations into token ids with a tokenizer's chat template.

    Args:
        tokenizer: a transformers tokenizer; it is read, never changed.
        mode: "auto" uses `chat_template`. "none" uses no template: prompt and completion are bare strings, with bos
            before (where the tokenizer puts one) and eos behind.
        chat_template: Jinja text; the tokenizer's own by default, or the one named plain where it has none.
        notices: what is to be said of `chat_template`.
        learnt: which part of a conversation is trained on.
        reader: what a vision-language model reads pictures with; None of models that read text alone.

    Attributes:
        chat_template: the Jinja text in use, to be kept with the adapter and exported; None in mode "none".
        notices: sentences a user should see.
        stop_ids: the ids that end an answer: the template's end-of-turn token, that of a tool call, and eos.
        shows_calls, shows_thinking: whether the template writes down tool calls, and thinking in a key of its own.
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
        learnt: Learnt | None = None,
        reader: PictureReader | None = None,
    ):
        if mode not in ("auto", "none"):
            raise ConfigError(f"template: {mode!r}", "allowed: auto, none")
        self.tokenizer = tokenizer
        self.mode = mode
        self.learnt = learnt or Learnt()
        self.reader = reader
        self.encoder = TextEncoder(tokenizer)
        own = chat_template is None
        self.chat_template, self.notices = self._choose_template() if own else (chat_template, notices)
        self._has_generation_blocks = bool(self.chat_template and GENERATION_BLOCK.search(self.chat_template))
        self._call_form, self._openings, self._in_parts = PLAIN_CALLS, ("", ""), False
        self._in_parts = self._wants_parts()
        if self._refuses_system_turns():
            self.chat_template = f"{FOLD_SYSTEM}{self.chat_template}"
        self.folds_system = self.chat_template is not None and self.chat_template.startswith(FOLD_SYSTEM)
        self.shows_calls, self.shows_thinking = self._find_parts()
        probe, self._closing = self._find_closing(required=not own)
        self._empty_thought = "" if probe is None else empty_thought_of(self._render, probe)
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

    def encode_prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """The ids that chat and serving send for a conversation that ends in a user's or a tool's turn.

        Raises:
            DataError: the template refuses the conversation, or leaves out its tools.
        """
        if self.chat_template is None:
            return self.encode_text(self.render(messages, True))
        ids: list[int] = self.encode_asked(messages, tools).input_ids.tolist()
        return ids

    def asked(self, messages: Sequence[Message], tools: Tools = ()) -> tuple[list[int], dict[str, torch.Tensor]]:
        """What `encode_prompt` gives, and what a model is given of the conversation's pictures beside it, by name.

        Raises:
            DataError: as `encode_prompt`; or there are pictures, and the model reads none, or one cannot be read.
        """
        count = sum(len(message.pictures) for message in messages)
        if not count:
            return self.encode_prompt(messages, tools), {}
        if self.reader is None:
            raise DataError(
                f"the conversation has pictures ({count}), and the model reads text alone",
                "pictures are read by vision-language models: runs over rows with pictures, and models loaded for them",
            )
        row = self.encode_asked(messages, tools)
        return row.input_ids.tolist(), self.reader.collate([row], packed=False).pictures

    def encode_asked(self, messages: Sequence[Message], tools: Tools = ()) -> EncodedExample:
        """The same as a sequence of which nothing is learnt: with its pictures, where there are any.

        Raises:
            DataError: as `encode_prompt`; there is no template; or a picture cannot be read.
        """
        if self.chat_template is None:
            raise DataError("a conversation needs a chat template", "--template none has none")
        try:
            messages = self._prepared(messages)
            text, generated = whole = self._render(messages, True, tools)
            if tools:
                check_tools("this conversation", tools, text, self._render(messages, True).text)
            turns = self._find_turns(messages, whole, tools)
        except TemplateError as error:
            raise DataError(f"the chat template refuses this conversation: {error}") from error
        cuts = _cuts([turn for turn in turns if turn.stands_in(text)], generated)
        return self._encoded_pieces("this conversation", messages, text, cuts, [0.0] * (len(cuts) + 1))

    def encode_continued(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """The ids that are sent for a conversation whose last turn is the beginning of an answer, to go on with it.

        Raises:
            DataError: the template refuses the conversation, or leaves out that beginning or the tools.
        """
        if self.chat_template is None:
            return self.encode_text(self.render(messages, False))
        begun = messages[-1].content
        messages = self._prepared((*messages[:-1], replace(messages[-1], given=len(begun))))
        try:
            text, generated = whole = self._render(messages, False, tools)
            if tools:
                check_tools("this conversation", tools, text, self._render(messages, False).text)
            *turns, last = self._find_turns(messages, whole, tools)
        except TemplateError as error:
            raise DataError(f"the chat template refuses this conversation: {error}") from error
        if not last.prompted or last.words == last.end or not begun.strip():
            raise DataError("the chat template does not write down how the answer begins")
        cuts = [*_cuts([turn for turn in turns if turn.stands_in(text)], generated), last.start]
        return _flatten(self.encoder.encode_pieces(text[: last.words], cuts))

    def with_template(self) -> "PreTrainedTokenizerBase":
        """The tokenizer with the chat template in use, which it may not have had of its own."""
        if self.chat_template is not None:
            self.tokenizer.chat_template = self.chat_template
        return self.tokenizer

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
        return _encoded(origin, [(before, float(self.learnt.train_on == "all")), ([*after, *eos], 1.0), (rest, 0.0)])

    def _encode_conversation(self, origin: str, messages: Sequence[Message], tools: Tools) -> list[EncodedExample]:
        check_turns(origin, messages)
        if self.chat_template is None:
            raise RowError("needs-template", origin, "a row of messages needs a chat template")
        messages = self._prepared(keep_thoughts(messages, self.learnt.thinking)[0])
        whole = self._render(messages, False, tools)
        if tools:
            check_tools(origin, tools, whole.text, self._render(messages, False).text)
        turns = self._find_turns(messages, whole, tools)
        chosen = self.learnt.choose(messages)
        if not chosen:
            raise RowError(
                "nothing-to-learn", origin, f"no turn of it is learnt under --train-on {self.learnt.train_on}"
            )
        learnt = [turn for turn in turns if turn.index in chosen]
        if self.learnt.train_on == "all":
            return [self._encode_all(origin, messages, whole, turns)]
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
        check_content(origin, messages, text, {turn.index for turn in supervised})
        spans = [
            (start, turn.end, _weight(messages[turn.index]))
            for turn in supervised
            if (start := turn.supervised_start(generated)) is not None
        ]
        cuts = _cuts([turn for turn in turns if turn.index < len(messages) and turn.stands_in(text)], generated)
        weights = [next((w for start, end, w in spans if start <= cut < end), 0.0) for cut in (0, *cuts)]
        return self._encoded_pieces(origin, messages, text, cuts, weights)

    def _encode_all(
        self, origin: str, messages: Sequence[Message], whole: Rendered, turns: list[Turn]
    ) -> EncodedExample:
        """Tokens of a whole conversation, all of them trained on up to the end of the last answer."""
        marked = [index + 1 for index, m in enumerate(messages) if m.role != "assistant" and _weight(m) != 1]
        if marked:
            detail = f"turn {marked[0]} has a weight; under --train-on all only the assistant's turns may"
            raise RowError("unread-weight", origin, detail)
        text = whole.text
        check_content(origin, messages, text, {turn.index for turn in turns})
        standing = [turn for turn in turns if turn.stands_in(text)]
        spans = [(turn.start, turn.end, _weight(messages[turn.index])) for turn in standing]
        cuts = _cuts(standing, None)
        ended = max((turn.end for turn in standing), default=len(text))
        weights = [next((w for start, end, w in spans if start <= cut < end), float(cut < ended)) for cut in (0, *cuts)]
        return self._encoded_pieces(origin, messages, text, cuts, weights)

    def _encoded_pieces(
        self, origin: str, messages: Sequence[Message], text: str, cuts: list[int], weights: list[float]
    ) -> EncodedExample:
        """Tokens of a text between cuts, with the weight of each piece; pictures as the processor writes them."""
        pictures = [picture for message in messages for picture in message.pictures]
        if self.reader is not None:
            for said in filter(self.encoder.spells_special, (message.content for message in messages)):
                self.reader.check_text(said, origin)
        if not pictures:
            return _encoded(origin, list(zip(self.encoder.encode_pieces(text, cuts), weights, strict=True)))
        if self.reader is None:
            raise RowError("pictures-unread", origin, f"{len(pictures)} pictures in its turns")
        read = self.reader.read(pictures, text, origin)
        pieces = self.encoder.encode_pieces(read.text, [read.moved(cut) for cut in cuts])
        return self.reader.row(_encoded(origin, list(zip(pieces, weights, strict=True))), pictures, read)

    def _prepared(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The turns as the template is given them: thoughts in the key for them, where it shows that."""
        return tuple(map(thought_in_key, messages)) if self.shows_thinking else messages

    def _find_turns(self, messages: Sequence[Message], whole: Rendered, tools: Tools = ()) -> list[Turn]:
        render = partial(self._render, tools=tools)
        return find_turns(messages, whole, render, self._closing, self.encoder.special_tokens, self._empty_thought)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, tools: Tools = ()) -> Rendered:
        """The text of messages, and where the template itself marks what the assistant says. An answer at its end has
        an end, be it the opening of the next turn.

        Raises:
            jinja2.TemplateError: the template refuses the conversation, or does something wrong.
            DataError: it takes too long or too much.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # annotated as returning a string; it returns texts and spans
        try:
            with limited(RENDER_SECONDS, RENDER_BYTES):
                texts, spans = render(
                    conversations=[[message.as_dict(self._call_form, self._in_parts) for message in messages]],
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
        ends = not add_generation_prompt and messages[-1].role == "assistant"
        text = texts[0] + (self._openings[bool(messages[-1].calls)] if ends else "")
        return Rendered(text, tuple(spans[0]) if self._has_generation_blocks else None)

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

    def _wants_parts(self) -> bool:
        """Whether the template shows what is said where contents are lists of parts alone, as of some vision-language
        models.
        """
        if self.chat_template is None or self._shows_words():
            return False
        self._in_parts = True
        return self._shows_words()

    def _shows_words(self) -> bool:
        return any(self._refusal(probe) is None and closing_of(self._render, probe) is not None for probe in PROBES)

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

    def _find_parts(self) -> tuple[bool, bool]:
        """Whether the template shows tool calls, and thinking; and settles how it is given calls, and how answers end
        that it does not end itself."""
        if self.chat_template is None:
            return False, False

        def render(messages: Sequence[Message], form: CallForm) -> str:
            self._call_form = form
            return self._render(messages, False).text

        form = find_call_form(render)
        self._call_form = form or PLAIN_CALLS
        self._openings = next_openings(self._render, self.encoder.special_tokens, self.tokenizer.bos_token)
        return form is not None, shows_thinking(self._render)

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

    @cached_property
    def answer_form(self) -> AnswerForm:
        """How answers that it teaches hold thoughts and tool calls."""
        return NO_FORM if self.chat_template is None else find_answer_form(self._render)

    @property
    def adds_empty_thought(self) -> bool:
        """Whether the template puts an empty thought before an answer without one."""
        return bool(self._empty_thought)

    def _find_stop_ids(self, probe: tuple[Message, ...] | None) -> tuple[int, ...]:
        """The last supervised token of an answer to a conversation of one word, and eos."""
        stops = [] if self.encoder.eos_id is None else [self.encoder.eos_id]
        if probe is None:
            return tuple(stops)
        ends = [self._last_token(probe)]
        if self.shows_calls:
            ends.append(self._last_token((*probe[:-1], CALLING)))
        return tuple(dict.fromkeys([*(end for end in ends if end is not None), *stops]))

    def _last_token(self, messages: Sequence[Message]) -> int | None:
        """The token that ends a conversation's last turn; None where it has no end."""
        text, _ = whole = self._render(messages, False)
        turn = self._find_turns(messages, whole)[-1]
        return self.encoder.encode_pieces(text, [turn.end])[0][-1] if turn.closed else None


def _cuts(turns: list[Turn], generated: Sequence[tuple[int, int]] | None) -> list[int]:
    """Where a rendered text is cut: every place that may be a border between supervised and other tokens. Chat cuts
    its history at the same places as training does, so both get the same tokens."""
    starts = {start for turn in turns if (start := turn.supervised_start(generated)) is not None}
    return sorted(starts.union(*({turn.start, turn.words, turn.end} for turn in turns)))


def _weight(message: Message) -> float:
    return 1.0 if message.weight is None else message.weight


def _flatten(pieces: list[list[int]]) -> list[int]:
    return [token for piece in pieces for token in piece]


def _encoded(origin: str, pieces: Sequence[tuple[list[int], float]]) -> EncodedExample:
    """A sequence of pieces, each with how much the loss of its tokens counts; 0: not at all."""
    ids = np.array(_flatten([piece for piece, _ in pieces]), dtype=np.int32)
    each, lengths = np.array([weight for _, weight in pieces], dtype=np.float32), [len(piece) for piece, _ in pieces]
    supervised = torch.from_numpy((each > 0).repeat(lengths))
    plain = all(weight in (0, 1) for _, weight in pieces)
    weights = None if plain else torch.from_numpy(each.repeat(lengths))
    return EncodedExample(torch.from_numpy(ids), supervised, origin, weights=weights)
