"""Supervision is token-exact, and training sends the ids that chat sends, for every style of template and tokenizer."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rendered import template_of

from nybble.data.chat_templates import TEMPLATES
from nybble.data.examples import Example, Message
from nybble.data.template import ChatTemplate
from nybble.data.text_encoder import RowError
from nybble.errors import ConfigError, DataError

STYLES = ("chatml", "llama2", "llama3", "mistral", "gemma", "qwen3", "phi3", "generation")
KINDS = ("bytes", "cl100k", "newlines", "metaspace", "legacy")
TALK = (
    Message("user", "What is the capital of France?"),
    Message("assistant", "Paris is the capital."),
    Message("user", "hello"),
    Message("assistant", "You're welcome!"),
)
# What each style must supervise of TALK's first and last answer, written by hand.
SUPERVISED = {
    "chatml": ("Paris is the capital.<|im_end|>", "You're welcome!<|im_end|>"),
    "llama2": (" Paris is the capital. </s>", " You're welcome! </s>"),
    "llama3": ("Paris is the capital.<|eot_id|>", "You're welcome!<|eot_id|>"),
    "mistral": (" Paris is the capital.</s>", " You're welcome!</s>"),
    "gemma": ("Paris is the capital.<end_of_turn>", "You're welcome!<end_of_turn>"),
    "qwen3": ("Paris is the capital.<|im_end|>", "You're welcome!<|im_end|>"),
    "phi3": ("Paris is the capital.<|end|>", "You're welcome!<|end|>"),
    "generation": ("Paris is the capital.<|im_end|>", "You're welcome!<|im_end|>"),
}


def talk(*messages: Message) -> Example:
    return Example("f.jsonl:1", messages=messages)


def runs(encoded) -> list[tuple[int, int]]:
    """[start, end) of the runs of supervised tokens."""
    mask = [False, *encoded.supervised.tolist(), False]
    starts = [i for i in range(len(mask) - 1) if mask[i + 1] and not mask[i]]
    return [(start, mask.index(False, start + 1) - 1) for start in starts]


def text_of(tokenizer, ids) -> str:
    """Exact text of ids, white space included, special tokens spelled."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def whole_ids(tokenizer, messages, **options) -> list[int]:
    """What transformers itself makes of a conversation."""
    messages = [message.as_dict() for message in messages]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


def masked_by_offsets(tokenizer, text: str, answers: tuple[str, ...]) -> list[bool]:
    """An independent mask: tokens whose characters lie within the answers' places in the text."""
    places, position = [], 0
    for answer in answers:
        start = text.index(answer, position)
        position = start + len(answer)
        places.append((start, position))
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [any(start <= a and b <= end for start, end in places) for a, b in offsets]


@pytest.mark.parametrize("style", STYLES)
def test_one_answer_equals_transformers_ids_and_offset_mask(tokenizer_of, style):
    tokenizer = tokenizer_of("cl100k", style)
    [encoded] = ChatTemplate(tokenizer).encode_example(talk(*TALK[:2]))
    text = tokenizer.apply_chat_template([m.as_dict() for m in TALK[:2]], tokenize=False)
    assert encoded.input_ids.tolist() == whole_ids(tokenizer, TALK[:2])
    assert encoded.supervised.tolist() == masked_by_offsets(tokenizer, text, SUPERVISED[style][:1])
    assert text_of(tokenizer, encoded.answer_ids) == SUPERVISED[style][0]
    empty = tokenizer("<think>\n\n</think>\n\n", add_special_tokens=False)["input_ids"] if style == "qwen3" else []
    assert encoded.prompt_ids == whole_ids(tokenizer, TALK[:1], add_generation_prompt=True) + empty


@pytest.mark.parametrize("style", [style for style in STYLES if style != "qwen3"])
def test_each_answer_of_a_conversation_is_supervised(tokenizer_of, style):
    tokenizer = tokenizer_of("cl100k", style)
    [encoded] = ChatTemplate(tokenizer).encode_example(talk(*TALK))
    text = tokenizer.apply_chat_template([m.as_dict() for m in TALK], tokenize=False)
    assert encoded.input_ids.tolist() == whole_ids(tokenizer, TALK)
    assert encoded.supervised.tolist() == masked_by_offsets(tokenizer, text, SUPERVISED[style])


def test_a_template_that_rewrites_history_gives_each_answer_its_own_sequence(tokenizer_of):
    tokenizer = tokenizer_of("cl100k", "qwen3")
    thoughtful = (TALK[0], Message("assistant", "<think>\nhm\n</think>\n\nParis."), *TALK[2:])
    first, last = ChatTemplate(tokenizer).encode_example(talk(*thoughtful))
    assert first.input_ids.tolist() == whole_ids(tokenizer, thoughtful[:2])
    assert text_of(tokenizer, first.answer_ids) == "<think>\nhm\n</think>\n\nParis.<|im_end|>"
    assert last.input_ids.tolist() == whole_ids(tokenizer, thoughtful)
    assert "hm" not in text_of(tokenizer, last.input_ids)
    [run] = runs(last)
    assert text_of(tokenizer, last.input_ids[slice(*run)]) == SUPERVISED["qwen3"][1]


@pytest.mark.parametrize("kind", ("metaspace", "legacy"))
@pytest.mark.parametrize("style", ("llama2", "mistral", "llama3", "chatml"))
def test_sentencepiece_tokenizers_keep_their_spaces(tokenizer_of, style, kind):
    """No space is slipped in where an answer begins, and none is lost."""
    tokenizer = tokenizer_of(kind, style, adds_bos=True)
    [encoded] = ChatTemplate(tokenizer).encode_example(talk(*TALK))
    assert encoded.input_ids.tolist() == whole_ids(tokenizer, TALK)
    assert encoded.prompt_ids == whole_ids(tokenizer, TALK[:1], add_generation_prompt=True)
    answer = "".join(tokenizer.convert_ids_to_tokens(encoded.answer_ids)).replace("▁", " ")
    assert answer == SUPERVISED[style][0]


@pytest.mark.parametrize("style", ("llama2", "llama3", "mistral", "gemma"))
def test_bos_is_never_doubled(tokenizer_of, style):
    tokenizer = tokenizer_of("bytes", style, adds_bos=True)
    [encoded] = ChatTemplate(tokenizer).encode_example(talk(*TALK[:2]))
    assert encoded.input_ids.tolist().count(tokenizer.bos_token_id) == 1


BITS = [" ", "\n", "\n\n", "\t", "a", "x", "The answer", ".", "'s", "é", "漢", "▁"]
NASTY = st.lists(st.sampled_from(BITS), min_size=1, max_size=8).map("".join).filter(str.strip)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", [*STYLES, "forced"])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(NASTY, min_size=4, max_size=4))
def test_answers_follow_exactly_the_ids_chat_sends(tokenizer_of, style, kind, contents):
    """Whatever the contents: white space at borders, bytes that merge across them, many turns."""
    tokenizer = tokenizer_of(kind, style)
    template = ChatTemplate(tokenizer)
    messages = [Message(message.role, content) for message, content in zip(TALK, contents, strict=True)]
    sequences = template.encode_example(talk(*messages))
    answers = [(encoded, run) for encoded in sequences for run in runs(encoded)]
    assert len(answers) == 2
    for turn, (encoded, (start, end)) in zip((1, 3), answers, strict=True):
        ids = encoded.input_ids.tolist()
        rendered = template.render(messages[: turn + 1], False)
        prompt = template.render(messages[:turn], True)
        sent = template.encode_prompt(messages[:turn])
        assert ids[: len(sent)] == sent
        if style in ("forced", "qwen3"):  # what the template puts before the answer is context, too
            prompt += "The\n" if style == "forced" else "<think>\n\n</think>\n\n"
        else:
            assert start == len(sent)
        if kind not in ("metaspace", "legacy"):  # decoding is exact: the answer's text is, too
            assert text_of(tokenizer, ids[:start]) == prompt
            expected = rendered[len(prompt) :]
            stop = tokenizer.convert_ids_to_tokens(template.stop_ids[0])
            assert text_of(tokenizer, ids[start:end]) == expected[: expected.index(stop) + len(stop)]
        assert ids[end - 1] == template.stop_ids[0]


def test_a_token_never_straddles_the_border_of_an_answer(tokenizer_of):
    """Tokenised in one go, the header's newline and the answer's would be one token."""
    tokenizer = tokenizer_of("newlines", "chatml")
    messages = (TALK[0], Message("assistant", "\n\nThe answer is"))
    prompt = whole_ids(tokenizer, messages[:1], add_generation_prompt=True)
    assert whole_ids(tokenizer, messages)[: len(prompt)] != prompt, "the tokenizer does not merge here: useless test"
    [encoded] = ChatTemplate(tokenizer).encode_example(talk(*messages))
    assert encoded.prompt_ids == prompt
    assert text_of(tokenizer, encoded.answer_ids) == "\n\nThe answer is<|im_end|>"


def test_prompt_and_completion_become_turns(tokenizer_of):
    template = ChatTemplate(tokenizer_of("bytes", "chatml"))
    pair = Example("f:1", prompt=TALK[0].content, completion=TALK[1].content)
    [encoded], [same] = template.encode_example(pair), template.encode_example(talk(*TALK[:2]))
    assert encoded.input_ids.equal(same.input_ids) and encoded.supervised.equal(same.supervised)


@pytest.mark.parametrize("adds_bos", (True, False))
@pytest.mark.parametrize("kind", KINDS)
def test_no_template_leaves_strings_bare(tokenizer_of, kind, adds_bos):
    tokenizer = tokenizer_of(kind, "chatml", adds_bos)
    template = ChatTemplate(tokenizer, "none")
    [encoded] = template.encode_example(Example("f:1", prompt="hello there, ", completion="general."))
    assert (
        encoded.prompt_ids
        == tokenizer("hello there, ")["input_ids"]
        == template.encode_prompt([Message("user", "hello there, ")])
    )
    assert encoded.answer_ids[-1] == tokenizer.eos_token_id
    assert text_of(tokenizer, encoded.answer_ids[:-1]).strip() == "general."


@pytest.mark.parametrize("mode", ("auto", "none"))
def test_text_rows_are_supervised_whole_up_to_eos(tokenizer_of, mode):
    tokenizer = tokenizer_of("bytes", "chatml", adds_bos=True)
    [encoded] = ChatTemplate(tokenizer, mode).encode_example(Example("f:1", text="hello there"))
    assert encoded.input_ids.tolist() == [*tokenizer("hello there")["input_ids"], tokenizer.eos_token_id]
    assert encoded.supervised.tolist() == [False] + [True] * (len(encoded) - 1)


@pytest.mark.parametrize("adds_bos", (True, False))
def test_a_tokenizer_without_template_gets_the_documented_one(tokenizer_of, adds_bos):
    tokenizer = tokenizer_of("bytes", None, adds_bos)
    template = ChatTemplate(tokenizer)
    [encoded] = template.encode_example(talk(*TALK))
    bos = "<s>" if adds_bos else ""
    assert text_of(tokenizer, encoded.input_ids) == (
        f"{bos}### User:\nWhat is the capital of France?\n\n### Assistant:\nParis is the capital.</s>\n"
        "### User:\nhello\n\n### Assistant:\nYou're welcome!</s>\n"
    )
    ids = encoded.input_ids.tolist()
    assert [text_of(tokenizer, ids[slice(*run)]) for run in runs(encoded)] == [
        "Paris is the capital.</s>",
        "You're welcome!</s>",
    ]
    assert "no chat template" in template.notices[0] and template.stop_ids == (tokenizer.eos_token_id,)
    assert tokenizer.chat_template is None, "the tokenizer is left as it was"


@pytest.mark.parametrize("style", STYLES)
def test_stop_ids_are_the_end_of_turn_then_eos(tokenizer_of, end_of_turn, style):
    tokenizer = tokenizer_of("bytes", style)
    expected = [tokenizer.convert_tokens_to_ids(end_of_turn[style]), tokenizer.eos_token_id]
    assert list(ChatTemplate(tokenizer).stop_ids) == list(dict.fromkeys(expected))


def test_a_greeting_before_any_user_is_not_supervised(tokenizer_of):
    tokenizer = tokenizer_of("bytes", "chatml")
    [encoded] = ChatTemplate(tokenizer).encode_example(talk(Message("assistant", "hello"), *TALK[:2]))
    assert text_of(tokenizer, encoded.answer_ids) == SUPERVISED["chatml"][0] and len(runs(encoded)) == 1


def with_template(tokenizer_of, text: str):
    tokenizer = tokenizer_of("bytes", "chatml")
    copy = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="<|im_end|>")
    copy.chat_template = text
    return ChatTemplate(copy)


def test_template_that_loses_a_message(tokenizer_of):
    template = with_template(
        tokenizer_of,
        "{% for m in messages if m['role'] != 'system' %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}",
    )
    assert template.encode_example(talk(*TALK[:2]))
    with pytest.raises(RowError, match=r"leaves out .* message 1, by system") as error:
        template.encode_example(talk(Message("system", "Be brief."), *TALK[:2]))
    assert error.value.finding == "template-loses-content" and "f.jsonl:1" in str(error.value)


def test_template_whose_answers_do_not_follow_its_prompt(tokenizer_of):
    template = with_template(
        tokenizer_of,
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:<think>\n{% endif %}",
    )
    with pytest.raises(RowError) as error:
        template.encode_example(talk(*TALK))
    assert error.value.finding == "template-rewrites-prompt"
    assert text_of(template.tokenizer, template.encode_prompt(TALK[:3])).endswith("assistant:<think>\n")


@pytest.mark.parametrize("answer", ["a", "an answer that is longer than an empty thought"])
def test_a_prompt_that_begins_with_what_answers_do_not_have_is_refused_row_by_row(tokenizer_of, answer):
    """An empty thought stands in the prompt and in no finished conversation."""
    template = template_of(
        tokenizer_of,
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
    )
    assert template.tokenizer.convert_tokens_to_ids("<|im_end|>") in template.stop_ids
    with pytest.raises(RowError) as error:
        template.encode_example(Example("x:1", messages=(Message("user", "q"), Message("assistant", answer))))
    assert error.value.finding == "template-rewrites-prompt"


def test_generation_block_that_begins_late_is_honoured(tokenizer_of):
    template = with_template(
        tokenizer_of,
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '>ok ' }}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}{% else %}{{ m['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '>' }}{% endif %}",
    )
    [encoded] = template.encode_example(talk(*TALK[:2]))
    assert text_of(template.tokenizer, encoded.answer_ids) == "Paris is the capital.<|im_end|>"
    assert text_of(template.tokenizer, encoded.prompt_ids) == TALK[0].content + ">ok "


@pytest.mark.parametrize(
    "style, messages, finding",
    [
        ("chatml", (TALK[0],), "no-assistant-turn"),
        ("chatml", (TALK[1],), "no-user-turn"),
        ("chatml", (Message("system", "hello"), TALK[1]), "no-user-turn"),
        ("chatml", (TALK[1], TALK[0]), "no-user-turn"),
        ("chatml", (TALK[0], Message("assistant", " \n")), "empty-answer"),
        ("llama2", (TALK[0], TALK[0], TALK[1]), "template-refuses"),
    ],
)
def test_rows_that_cannot_be_trained_on(tokenizer_of, style, messages, finding):
    with pytest.raises(RowError) as error:
        ChatTemplate(tokenizer_of("bytes", style)).encode_example(talk(*messages))
    assert error.value.finding == finding and error.value.origin == "f.jsonl:1"


def test_messages_need_a_template(tokenizer_of):
    with pytest.raises(RowError) as error:
        ChatTemplate(tokenizer_of("bytes", "chatml"), "none").encode_example(talk(*TALK))
    assert error.value.finding == "needs-template"


def test_chat_that_the_template_refuses(tokenizer_of):
    with pytest.raises(DataError, match="roles must alternate"):
        ChatTemplate(tokenizer_of("bytes", "llama2")).encode_prompt([TALK[0], TALK[0]])


def test_unknown_mode(tokenizer_of):
    with pytest.raises(ConfigError, match="auto, none"):
        ChatTemplate(tokenizer_of("bytes", "chatml"), "chatml")


def test_tokenizer_without_eos(tokenizer_of):
    backend = tokenizer_of("bytes", None).backend_tokenizer
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(DataError, match="end-of-sequence"):
        ChatTemplate(PreTrainedTokenizerFast(tokenizer_object=backend))


@pytest.mark.parametrize("times", [0, 1, 2])
def test_a_template_that_begins_twice_is_said(tokenizer_of, times):
    tokenizer = tokenizer_of("bytes", adds_bos=True)
    template = ChatTemplate(tokenizer, chat_template="{{ bos_token }}" * times + TEMPLATES["plain"].jinja(bos=False))
    assert [notice for notice in template.notices if "begins with <s> twice" in notice] == list(template.notices)
    assert len(template.notices) == (times == 2)
