"""What the rows of a conversation carry beside their words: marks, thinking, tools, system turns, special tokens.
Nothing of it is lost or trained on in silence."""

import json

import pytest

from nybble.data.chat_templates import TEMPLATES
from nybble.data.examples import Example, Message
from nybble.data.open_template import open_template
from nybble.data.prepare import prepare
from nybble.data.template import ChatTemplate
from nybble.data.turns import HARMLESS_KEYS
from nybble.errors import ConfigError, DataError
from nybble.options.groups import RowOptions
from nybble.options.option import build_options
from nybble.options.verbs import DataConfig

USER, ASSISTANT = {"role": "user", "content": "hello there"}, {"role": "assistant", "content": "The answer"}
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['reasoning_content'] %}{{ '<think>' + m['reasoning_content'] + '</think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def read(tmp_path, tokenizer_of):
    """read(rows, template) -> PreparedData"""

    def prepared(rows, template=None, **options):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        template = template or ChatTemplate(tokenizer_of("bytes", "chatml"))
        return prepare(str(path), template, max_seq_len=512, validation_fraction=0.25, **options)

    return prepared


def talks(*turns, count=8, **columns):
    """Rows that differ in their first turn."""
    first, *rest = turns
    return [{"messages": [{**first, "content": f"{first['content']} {n}"}, *rest], **columns} for n in range(count)]


def finding(data, id):
    return next((found for found in data.audit.findings if found.id == id), None)


def learnt(data, tokenizer):
    """The texts of all supervised runs, sorted."""
    texts = []
    for row in (*data.train, *data.validation):
        ids, mask = row.input_ids.tolist(), [*row.supervised.tolist(), False]
        run = []
        for token, supervised in zip([*ids, None], mask, strict=True):
            if supervised:
                run.append(token)
            elif run:
                texts.append(tokenizer.decode(run))
                run = []
    return sorted(texts)


# ---- marks


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("no, yes", [(0, 1), (False, True), (0.0, None)])
def test_a_turn_marked_as_not_to_be_learnt_is_context(read, tokenizer_of, key, no, yes):
    bad = {"role": "assistant", "content": "nonsense", key: no}
    data = read(talks(USER, bad, {"role": "user", "content": "again"}, {**ASSISTANT, key: yes}))
    tokenizer = tokenizer_of("bytes", "chatml")
    assert learnt(data, tokenizer) == ["The answer<|im_end|>"] * 8
    assert all("nonsense" in tokenizer.decode(row.input_ids) for row in data.train)
    data.audit.check()


def test_a_marked_turn_of_a_template_that_rewrites_history_is_no_sequence_of_its_own(read, tokenizer_of):
    qwen = ChatTemplate(tokenizer_of("bytes", "qwen3"))
    bad = {"role": "assistant", "content": "nonsense", "weight": 0}
    data = read(talks(USER, bad, USER, ASSISTANT), qwen)
    assert len(data.train) + len(data.validation) == 8
    assert not any("nonsense" in text for text in learnt(data, qwen.tokenizer))


@pytest.mark.parametrize("mark", [-1, "no", [0], float("nan")])
def test_what_is_no_weight_is_refused_with_its_place(read, mark):
    with pytest.raises(DataError, match=r"(?s)a\.jsonl:1: turn 2 has weight .*a number of 0 or more"):
        read(talks(USER, {**ASSISTANT, "weight": mark}))


def test_marks_that_contradict_each_other_are_refused(read):
    with pytest.raises(DataError, match="weight and train contradict"):
        read(talks(USER, {**ASSISTANT, "weight": 0, "train": True}))


def test_rows_of_which_nothing_is_to_be_learnt_are_dropped_and_counted(read):
    rows = [*talks(USER, ASSISTANT), *talks({**USER, "content": "x"}, {**ASSISTANT, "loss": False}, count=1)]
    data = read(rows)
    found = finding(data, "nothing-to-learn")
    assert (found.level, found.rows) == ("warning", ("a.jsonl:9",)) and data.audit.num_dropped == 1


def test_a_user_turn_marked_as_to_be_learnt_stops_and_can_be_accepted(read):
    rows = talks({**USER, "train": True}, ASSISTANT)
    with pytest.raises(DataError, match="marked-prompt: 8 x"):
        read(rows).audit.check()
    read(rows, allow=("marked-prompt",)).audit.check()
    read(talks({**USER, "loss": None}, {**ASSISTANT, "loss": True})).audit.check()


# ---- keys


def test_keys_that_nothing_reads_stop_with_their_counts(read):
    rows = [*talks(USER, {**ASSISTANT, "mask": False}), *talks({**USER, "x": 1, "content": "y"}, ASSISTANT, count=3)]
    data = read(rows)
    found = finding(data, "unread-message-keys")
    assert (found.level, found.num_rows) == ("error", 11) and found.detail == "'mask' in 8 rows, 'x' in 3 rows"
    with pytest.raises(DataError, match="--allow unread-message-keys"):
        data.audit.check()
    read(rows, allow=("unread-message-keys",)).audit.check()


def test_keys_that_say_nothing_or_only_where_a_turn_comes_from_are_let_through(read):
    empty = {"tool_calls": None, "images": [], "mask": None, "reasoning_content": ""}
    data = read(talks(USER, {**ASSISTANT, **dict.fromkeys(HARMLESS_KEYS, 1), **empty}))
    assert data.audit.findings == ()


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_in_a_key_of_its_own_is_rendered_and_learnt(read, tokenizer_of, key):
    template = with_template(tokenizer_of, THINKING)
    data = read(talks(USER, {**ASSISTANT, key: "let me see"}), template)
    assert learnt(data, template.tokenizer) == ["<think>let me see</think>The answer<|im_end|>"] * 8
    data.audit.check()


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_that_the_template_leaves_out_stops(read, key):
    with pytest.raises(DataError, match=r"template-loses-content: 8 x .*the thinking of message 2"):
        read(talks(USER, {**ASSISTANT, key: "let me see"})).audit.check()


@pytest.mark.parametrize("thought", ["The answer", "answer", "The question"])
def test_left_out_thinking_whose_words_stand_elsewhere_too_stops(read, thought):
    user = {"role": "user", "content": "The question"}
    with pytest.raises(DataError, match=r"template-loses-content: 8 x .*the thinking of message 2"):
        read(talks(user, {**ASSISTANT, "reasoning": thought})).audit.check()


def test_turns_of_the_same_words_each_have_their_place(read, tokenizer_of):
    template = with_template(tokenizer_of, THINKING)
    same = [{"role": "user", "content": "The answer"}, {**ASSISTANT, "reasoning": "The answer"}]
    read(talks(*same, *same), template).audit.check()


def test_two_different_thoughts_are_refused(read):
    with pytest.raises(DataError, match="thinking and reasoning differ"):
        read(talks(USER, {**ASSISTANT, "thinking": "a", "reasoning": "b"}))


def test_content_in_text_parts_is_one_text_and_other_parts_are_refused(read, tokenizer_of):
    parts = [{"type": "text", "text": "The "}, {"type": "text", "text": "answer"}]
    data = read(talks(USER, {"role": "assistant", "content": parts}))
    assert learnt(data, tokenizer_of("bytes", "chatml")) == ["The answer<|im_end|>"] * 8
    parts.append({"type": "input_audio", "input_audio": {"data": "x"}})
    with pytest.raises(DataError, match=r"a\.jsonl:1: turn 2 .*'input_audio'"):
        read(talks(USER, {"role": "assistant", "content": parts}))


# ---- tools


def with_template(tokenizer_of, text, eos="<|im_end|>", **options):
    tokenizer = tokenizer_of("bytes", "chatml")
    copy = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token=eos)
    copy.chat_template = text
    return ChatTemplate(copy, **options)


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_are_given_to_the_template(read, tokenizer_of, tools):
    template = with_template(tokenizer_of, TOOLS)
    data = read(talks(USER, ASSISTANT, tools=tools), template)
    data.audit.check()
    expected = template.tokenizer.apply_chat_template(
        [{**USER, "content": "hello there 0"}, ASSISTANT], tools=[TOOL], tokenize=True, return_dict=True
    )["input_ids"]
    assert expected in [row.input_ids.tolist() for row in (*data.train, *data.validation)]
    assert "not read" not in data.audit.layout


@pytest.mark.parametrize("mode", ["auto", "none"])
def test_tools_that_have_no_place_stop(read, tokenizer_of, mode):
    rows = [{"prompt": f"q {n}", "completion": "a", "tools": [TOOL]} for n in range(8)]
    with pytest.raises(DataError, match=r"template-loses-content: 8 x .* no place for .* tools"):
        read(rows, ChatTemplate(tokenizer_of("bytes", "chatml"), mode)).audit.check()
    read([{**row, "tools": []} for row in rows], ChatTemplate(tokenizer_of("bytes", "chatml"), mode)).audit.check()


# ---- ends of turns


@pytest.mark.parametrize("style", ["chatml", "llama2", "llama3", "mistral", "gemma", "phi3", "generation"])
@pytest.mark.parametrize("last", ["<|endoftext|>", "<|eot_id|>", "<|user|>\n<|im_start|>", "</s>"])
def test_an_answer_that_ends_in_a_special_token_still_learns_its_end_of_turn(tokenizer_of, end_of_turn, style, last):
    tokenizer = tokenizer_of("cl100k", style)
    talk = [Message("user", "hi"), Message("assistant", f"yo {last}"), Message("user", "a"), Message("assistant", "b")]
    [encoded] = ChatTemplate(tokenizer).encode_example(Example("f:1", messages=tuple(talk)))
    first = tokenizer.decode(encoded.answer_ids)
    assert "".join(first.split()) == "".join(f"yo {last}{end_of_turn[style]}".split())


def test_each_row_must_end_its_answers(read, tokenizer_of):
    """The template ends only short answers: one such row among many is found."""
    template = with_template(
        tokenizer_of,
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
        "{% if m['content'] | length < 40 %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    )
    long = talks({**USER, "content": "x"}, {**ASSISTANT, "content": "word " * 12}, count=1)
    with pytest.raises(DataError, match=r"no-end-of-turn: 1 x .*a\.jsonl:9"):
        read([*talks(USER, ASSISTANT), *long], template).audit.check()


# ---- text rows with marks of their own


@pytest.mark.parametrize("mode", ["auto", "none"])
@pytest.mark.parametrize("begin", ["", "<s>"])
@pytest.mark.parametrize("end", ["", "</s>", "</s>\n\n"])
def test_text_gets_no_second_begin_or_end(tokenizer_of, mode, begin, end):
    tokenizer = tokenizer_of("bytes", "llama2", adds_bos=True)
    [encoded] = ChatTemplate(tokenizer, mode).encode_example(Example("f:1", text=f"{begin}hello there{end}"))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    words = tokenizer.encode("hello there", add_special_tokens=False)
    after = tokenizer.encode(end.removeprefix("</s>"), add_special_tokens=False)
    assert encoded.input_ids.tolist() == [bos, *words, eos, *after]
    assert encoded.supervised[1:].tolist() == [True] * (len(words) + 1) + [False] * len(after)


def test_text_that_ends_in_the_templates_mark_gets_no_eos_behind_it(read, tokenizer_of):
    tokenizer = tokenizer_of("bytes", "gemma")
    texts = [f"<s><start_of_turn>user\n{n}<end_of_turn>\n<start_of_turn>model\nyo<end_of_turn>\n" for n in range(8)]
    data = read([{"text": text} for text in texts], ChatTemplate(tokenizer))
    assert sorted(tokenizer.decode(row.input_ids) for row in (*data.train, *data.validation)) == sorted(texts)
    found = finding(data, "special-token-in-text")
    assert (found.level, found.num_rows) == ("warning", 8) and finding(data, "special-token-in-content") is None
    data.audit.check()


def test_a_bare_prompt_that_spells_its_begin_gets_no_second_one_in_training_and_in_chat(tokenizer_of):
    template = ChatTemplate(tokenizer_of("bytes", "llama2", adds_bos=True), "none")
    [encoded] = template.encode_example(Example("f:1", prompt="<s>hello ", completion="there</s>"))
    assert encoded.prompt_ids == template.encode_prompt([Message("user", "<s>hello ")])
    assert encoded.input_ids.tolist().count(template.tokenizer.bos_token_id) == 1
    assert encoded.input_ids.tolist().count(template.tokenizer.eos_token_id) == 1


# ---- system turns that a template refuses


@pytest.mark.parametrize("style", ["gemma", "llama2-strict"])
def test_a_refused_system_turn_is_folded_into_the_users(read, tokenizer_of, style):
    tokenizer = tokenizer_of("bytes", "gemma")
    template = ChatTemplate(tokenizer)
    if style != "gemma":
        strict = (
            "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] + eos_token }}{% endfor %}"
        )
        template = with_template(tokenizer_of, strict)
    system = {"role": "system", "content": "Be brief."}
    rows = talks(USER, ASSISTANT, USER, ASSISTANT)
    rows[2]["messages"].insert(0, system)
    rows[5]["messages"].insert(2, system)
    data = read(rows, template)
    data.audit.check()
    found = finding(data, "system-folded")
    assert (found.level, found.num_rows, data.audit.num_dropped) == ("warning", 2, 0)
    by_hand = [
        Message("user", "Be brief.\n\nhello there 2"),
        *(Message(t["role"], t["content"]) for t in rows[2]["messages"][2:]),
    ]
    [expected] = template.encode_example(Example("x", messages=tuple(by_hand)))
    [folded] = [row for row in (*data.train, *data.validation) if row.origin == "a.jsonl:3"]
    assert folded.input_ids.equal(expected.input_ids) and folded.supervised.equal(expected.supervised)
    asked = template.encode_prompt([Message("system", "Be brief."), Message("user", "hello there 2")])
    assert folded.prompt_ids == asked


def test_a_template_that_takes_system_turns_is_left_as_it_is(tokenizer_of):
    for style in ("chatml", "llama2", "qwen3", "phi3"):
        tokenizer = tokenizer_of("bytes", style)
        assert ChatTemplate(tokenizer).chat_template == tokenizer.chat_template


def test_folding_changes_no_conversation_without_system_turns(tokenizer_of):
    tokenizer = tokenizer_of("bytes", "gemma")
    template = ChatTemplate(tokenizer)
    assert template.folds_system
    talk = [Message("user", " hi\n"), Message("assistant", "yo"), Message("user", "{{ x }}")]
    for prompt in (True, False):
        own = tokenizer.apply_chat_template(
            [message.as_dict() for message in talk], tokenize=False, add_generation_prompt=prompt
        )
        assert template.render(talk, prompt) == own


# ---- a template of the user's choice


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "deepseek"])
def test_named_templates_supervise_the_answer_and_its_end(tokenizer_of, name):
    tokenizer = tokenizer_of("bytes", None, adds_bos=True)
    template = open_template(options(chat_template=name), tokenizer)
    talk = (Message("system", "s"), Message("user", "hello"), Message("assistant", "general"))
    [encoded] = template.encode_example(Example("f:1", messages=talk))
    end = (*TEMPLATES[name].marks, "</s>")[-1] if name != "plain" else "</s>"
    end = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>", "gemma": "<end_of_turn>", "phi": "<|end|>"}.get(name, end)
    assert tokenizer.decode(encoded.answer_ids) == f"general{end}"
    assert template.stop_ids[0] == tokenizer.convert_tokens_to_ids(end)
    assert encoded.prompt_ids == template.encode_prompt(talk[:2])
    assert encoded.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert not template.folds_system and name in template.notices[0]


def options(**given):
    return RowOptions(**given)


def test_a_template_of_ones_own_trains_what_the_tokenizers_would_lose(read, tokenizer_of, tmp_path):
    """R1's own template cuts the thinking, and opens it in the prompt."""
    own = (
        "{% for m in messages %}{{ m['role'] + ':' + CUT + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:<think>\n' }}{% endif %}"
    )
    tokenizer = with_template(tokenizer_of, own.replace("CUT", "m['content'].split('</think>')[-1]")).tokenizer
    rows = talks(USER, {**ASSISTANT, "content": "<think>\nhm\n</think>\n\nyes"})
    with pytest.raises(DataError, match=r"--chat-template FILE\|NAME"):
        read(rows, ChatTemplate(tokenizer)).audit.check()
    file = tmp_path / "own.jinja"
    file.write_text(own.replace("CUT", "m['content']").replace("<think>\n", ""), encoding="utf-8")
    template = open_template(options(chat_template=str(file)), tokenizer)
    data = read(rows, template)
    data.audit.check()
    assert learnt(data, tokenizer) == ["<think>\nhm\n</think>\n\nyes<|im_end|>"] * 8
    assert data.audit.notices[0] == f"Chat template: {file}, in place of the tokenizer's own."


@pytest.mark.parametrize("name", ["nothing", "llama9", "", "/"])
def test_a_template_that_is_not_there_is_refused_with_the_names(tokenizer_of, name):
    with pytest.raises(ConfigError, match="plain, chatml, llama3"):
        open_template(options(chat_template="x").model_copy(update={"chat_template": name}), tokenizer_of())


@pytest.mark.parametrize("text", ["", "hello", "{% for m in messages %}", "{{ messages[0].content }}", "{{ 1 / 0 }}"])
def test_a_file_that_renders_no_conversation_is_refused(tokenizer_of, tmp_path, text):
    file = tmp_path / "t.jinja"
    file.write_text(text)
    with pytest.raises(ConfigError, match="renders no answer"):
        open_template(options(chat_template=str(file)), tokenizer_of())


def test_a_named_template_whose_marks_the_tokenizer_lacks_is_refused(tokenizer_of):
    with pytest.raises(ConfigError, match=r"(?s)deepseek needs special tokens.*--chat-template plain"):
        open_template(options(chat_template="deepseek"), tokenizer_of())


def test_no_template_and_a_template_contradict_each_other():
    with pytest.raises(ConfigError, match="template is none"):
        build_options(DataConfig, {"model": "m", "data": "d", "chat_template": "chatml", "template": "none"})


def test_a_recorded_template_wins_over_the_file_that_it_came_from(tokenizer_of, tmp_path):
    recorded = tmp_path / "chat_template.jinja"
    recorded.write_text(ChatTemplate(tokenizer_of("bytes", "gemma")).chat_template, encoding="utf-8")
    template = open_template(options(chat_template="gone.jinja"), tokenizer_of("bytes", "chatml"), recorded)
    assert template.chat_template == recorded.read_text(encoding="utf-8")
    assert template.encode_prompt([Message("system", "s"), Message("user", "u")])
    assert template.folds_system


# ---- time


@pytest.mark.parametrize("style", ["chatml", "qwen3"])
def test_each_beginning_of_a_conversation_is_rendered_once(tokenizer_of, style, monkeypatch):
    template = ChatTemplate(tokenizer_of("bytes", style))
    rendered = []
    monkeypatch.setattr(
        template, "_render", lambda *given, _r=template._render, **named: rendered.append(1) or _r(*given, **named)
    )
    said = [Message("user" if n % 2 == 0 else "assistant", f"words {n}") for n in range(40)]
    template.encode_example(Example("f:1", messages=tuple(said)))
    assert len(rendered) <= len(said) + 1
