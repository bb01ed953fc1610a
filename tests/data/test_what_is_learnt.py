"""Which part of a conversation is learnt, and how much: thinking, weights, --train-on, answers that go on."""

import json
from functools import partial

import pytest
import rendered
from rendered import learnt_texts

from nybble.data.examples import Example, Message, ToolCall
from nybble.data.field_names import field_names
from nybble.data.open_template import open_template
from nybble.data.packing import pack, pad
from nybble.data.prepare import prepare
from nybble.data.readers import read_examples
from nybble.data.supervision import Learnt
from nybble.data.template import ChatTemplate
from nybble.data.text_encoder import RowError
from nybble.errors import ConfigError, DataError
from nybble.options.groups import RowOptions

HEAD = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
TAIL = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
BLOCK = "{{ '<think>\n' + thought + '\n</think>\n\n' }}"
TAKEN = (  # a thought from its key, or from the content
    "{% set thought, said = m['reasoning_content'] or '', m['content'] %}{% if thought %}"
    "{% elif '</think>' in said %}{% set parts = said.split('</think>') %}"
    "{% set thought, said = parts[0].split('<think>')[-1].strip('\n'), parts[1].lstrip('\n') %}{% endif %}"
)
THINKERS = {
    # As Qwen3: earlier thoughts dropped, an empty one put before the last answer.
    "qwen3": HEAD + TAKEN + "{% if m['role'] == 'assistant' and loop.last %}" + BLOCK + "{% endif %}{{ said }}" + TAIL,
    # As Qwen3.5: the prompt opens the thought.
    "opens": (HEAD + TAKEN + "{% if m['role'] == 'assistant' %}" + BLOCK + "{% endif %}{{ said }}" + TAIL).replace(
        "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}"
    ),
    # As gpt-oss: only the key is known, and a channel of its own.
    "key": HEAD + "{% if m['thinking'] %}{{ '(' + m['thinking'] + ')' }}{% endif %}{{ m['content'] }}" + TAIL,
    # As DeepSeek's R1: thoughts are cut from every answer.
    "cuts": HEAD + "{{ m['content'].split('</think>')[-1].strip() }}" + TAIL,
    # As plain ChatML: content as it is.
    "plain": HEAD + "{{ m['content'] }}" + TAIL,
}
END = "<|im_end|>"
template_of = partial(rendered.template_of, eos=END)


def runs(template: ChatTemplate, *messages: Message) -> list[str]:
    return learnt_texts(template, Example("x:1", messages=messages))


ASK = Message("user", "q")
SPELLED = Message("assistant", "<think>\nhm\n</think>\n\nyes")
KEYED = Message("assistant", "yes", reasoning="hm")
BARE = Message("assistant", "yes")
THOUGHT = "<think>\nhm\n</think>\n\n"
TALK = (ASK, SPELLED, ASK, KEYED)
BOTH, NEITHER = [f"{THOUGHT}yes{END}"] * 2, [f"yes{END}"] * 2


@pytest.mark.parametrize(
    "style, thinking, expected",
    [
        ("qwen3", "keep", BOTH),
        ("qwen3", "last", [f"yes{END}", f"{THOUGHT}yes{END}"]),
        ("qwen3", "drop", NEITHER),
        ("opens", "keep", [f"hm\n</think>\n\nyes{END}"] * 2),
        ("opens", "drop", NEITHER),
        ("key", "keep", [f"(hm)yes{END}"] * 2),
        ("key", "last", [f"yes{END}", f"(hm)yes{END}"]),
        ("key", "drop", NEITHER),
        ("cuts", "drop", NEITHER),
        ("plain", "drop", NEITHER),
    ],
)
def test_thoughts_of_each_kind_of_template(tokenizer_of, style, thinking, expected):
    """Both ways to write a thought are read, and no empty one is learnt."""
    assert runs(template_of(tokenizer_of, THINKERS[style], thinking=thinking), *TALK) == expected


@pytest.mark.parametrize("style, turn", [("cuts", SPELLED), ("cuts", KEYED), ("plain", KEYED)])
def test_a_thought_that_the_template_cannot_show_is_named(tokenizer_of, style, turn):
    with pytest.raises(RowError, match=r"leaves out \(part of\)") as refused:
        runs(template_of(tokenizer_of, THINKERS[style]), ASK, turn)
    assert refused.value.finding == "template-loses-content"


def test_an_empty_thought_is_context_unless_the_row_spells_it(tokenizer_of):
    template = template_of(tokenizer_of, THINKERS["qwen3"])
    [row] = template.encode_example(Example("x:1", messages=(ASK, BARE)))
    assert template.tokenizer.decode(row.prompt_ids).endswith("assistant\n<think>\n\n</think>\n\n")
    assert runs(template, ASK, BARE) == [f"yes{END}"]
    empty = "<think>\n\n</think>\n\n"
    assert runs(template, ASK, Message("assistant", f"{empty}yes")) == [f"{empty}yes{END}"]
    assert runs(template, ASK, Message("assistant", " \n yes")) == [f" \n yes{END}"]  # white space of its own
    assert runs(template_of(tokenizer_of, THINKERS["opens"]), ASK, BARE) == [f"yes{END}"]


def test_last_keeps_the_thoughts_of_a_whole_loop_of_calls(tokenizer_of):
    text = (
        THINKERS["qwen3"]
        .replace("and loop.last", "")
        .replace("{{ said }}", "{{ said }}{% for c in m['tool_calls'] or [] %}{{ c['function'] | tojson }}{% endfor %}")
    )
    calling = Message("assistant", "", reasoning="look", calls=(ToolCall("f", {}, "c"),))
    talk = (ASK, KEYED, ASK, calling, Message("tool", "5", answers="c", name="f"), KEYED)
    assert runs(template_of(tokenizer_of, text, thinking="last"), *talk) == [
        f"yes{END}",
        f'<think>\nlook\n</think>\n\n{{"name": "f", "arguments": {{}}}}{END}',
        f"{THOUGHT}yes{END}",
    ]


def test_a_final_answer_before_which_earlier_thoughts_go_follows_the_prompt_that_chat_sends(tokenizer_of):
    """As gpt-oss: thoughts before a call are shown until the final answer is there."""
    text = (
        HEAD
        + (
            "{% if m['tool_calls'] %}{% if messages[-1]['role'] != 'assistant' or messages[-1]['tool_calls'] %}"
            "{{ '(' + m['thinking'] + ')' }}{% endif %}{{ m['tool_calls'][0]['function'] | tojson }}"
            "{% else %}{% if m['thinking'] %}{{ '(' + m['thinking'] + ')' }}{% endif %}{{ m['content'] }}{% endif %}"
        )
        + TAIL
    )
    calling = Message("assistant", "", reasoning="look", calls=(ToolCall("f", {}, "c"),))
    talk = (ASK, calling, Message("tool", "5", answers="c", name="f"), KEYED)
    template = template_of(tokenizer_of, text)
    called, final = template.encode_example(Example("x:1", messages=talk))
    assert final.prompt_ids == template.encode_prompt(talk[:3]) and called.prompt_ids == template.encode_prompt(
        talk[:1]
    )
    assert "(look)" in template.tokenizer.decode(final.prompt_ids)
    assert runs(template, *talk) == [f'(look){{"name": "f", "arguments": {{}}}}{END}', f"(hm)yes{END}"]


def audit_of(tmp_path, tokenizer_of, style, rows, **options):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rows))
    template = template_of(tokenizer_of, THINKERS[style], **options)
    return prepare(str(path), template, max_seq_len=256).audit


def test_the_audit_says_what_becomes_of_thinking(tokenizer_of, tmp_path):
    ask = {"role": "user", "content": "q"}
    think = {"role": "assistant", "content": "yes", "thinking": "hm"}
    rows = [[{**ask, "content": str(n)}, think, ask, think] for n in range(6)]
    rows += [[{**ask, "content": str(n)}, {"role": "assistant", "content": "yes"}] for n in range(6, 9)]
    audit = audit_of(tmp_path, tokenizer_of, "qwen3", rows, thinking="last")
    found = {finding.id: finding for finding in audit.findings}
    assert found["thinking-left-out"].num_rows == 6 and found["thinking-left-out"].level == "warning"
    assert found["thinking-left-out"].detail == "6 thoughts, --thinking last"
    assert found["empty-thinking"].num_rows == 9 and "6 rows hold thinking (--thinking last)." in audit.notices
    kept = audit_of(tmp_path, tokenizer_of, "qwen3", rows)
    assert {finding.id: finding.num_rows for finding in kept.findings}["empty-thinking"] == 3
    assert "thinking-left-out" not in {finding.id for finding in kept.findings}
    audit.check()
    kept.check()


# ---- what is trained on --------------------------------------------------------------------------

LONG = (Message("system", "s"), ASK, Message("assistant", "one"), ASK, Message("assistant", "two"), BARE)


@pytest.mark.parametrize(
    "train_on, expected",
    [
        ("assistant", [f"one{END}", f"two{END}", f"yes{END}"]),
        ("completion", [f"two{END}", f"yes{END}"]),
        ("last", [f"yes{END}"]),
    ],
)
def test_train_on(tokenizer_of, train_on, expected):
    template = template_of(tokenizer_of, THINKERS["plain"], train_on=train_on)
    assert runs(template, *LONG) == expected


def test_train_on_all_learns_every_token_up_to_the_last_end(tokenizer_of):
    template = template_of(tokenizer_of, THINKERS["plain"], train_on="all")
    [run] = runs(template, *LONG)
    assert run == template.render(LONG, False).removesuffix("\n")
    [row] = template.encode_example(
        Example("x:1", messages=(*LONG[:2], Message("assistant", "one", weight=0), *LONG[3:]))
    )
    unlearnt = template.tokenizer.decode(row.input_ids[~row.supervised])
    assert unlearnt == f"one{END}\n"
    with pytest.raises(RowError, match="turn 1 has a weight"):
        template.encode_example(Example("x:1", messages=(Message("system", "s", weight=0.0), *LONG[1:])))


def test_train_on_all_learns_the_prompts_of_bare_rows_too(tokenizer_of):
    tokenizer = tokenizer_of("bytes", "chatml")
    row = Example("x:1", prompt="hello ", completion="there")
    [whole] = ChatTemplate(tokenizer, "none", learnt=Learnt("all")).encode_example(row)
    [answer] = ChatTemplate(tokenizer, "none").encode_example(row)
    assert whole.input_ids.equal(answer.input_ids) and whole.supervised.all() and not answer.supervised.all()


def test_nothing_left_to_learn_is_named(tokenizer_of):
    template = template_of(tokenizer_of, THINKERS["plain"], train_on="last")
    with pytest.raises(RowError, match="no turn of it is learnt under --train-on last") as refused:
        runs(template, ASK, BARE, ASK, Message("assistant", "no", weight=0.0))
    assert refused.value.finding == "nothing-to-learn"


def test_options_reach_the_template(tokenizer_of):
    options = RowOptions(train_on="completion", thinking="drop")
    assert open_template(options, tokenizer_of("bytes", "chatml")).learnt == Learnt("completion", "drop")


# ---- weights -------------------------------------------------------------------------------------


def test_weights_of_turns_travel_to_the_batch(tokenizer_of):
    """Each target's weight is that of the turn that the target belongs to, packed or padded."""
    template = template_of(tokenizer_of, THINKERS["plain"])
    talk = (ASK, Message("assistant", "one", weight=0.25), ASK, Message("assistant", "two", weight=0.0), ASK, BARE)
    [row] = template.encode_example(Example("x:1", messages=talk))
    assert runs(template, *talk) == [f"one{END}", f"yes{END}"]
    of_run = {f"one{END}": 0.25, f"yes{END}": 1.0}
    expected = [
        weight
        for text, weight in of_run.items()
        for _ in template.tokenizer(text, add_special_tokens=False)["input_ids"]
    ]
    [plain] = template.encode_example(Example("x:2", messages=(ASK, BARE)))
    assert plain.weights is None
    for batch in (pack([row, plain]), pad([row, plain])):
        assert batch.supervised_weights.tolist()[: len(expected)] == expected
        assert batch.supervised_weights.tolist()[len(expected) :] == [1.0] * plain.supervised_tokens
    assert pack([plain, plain]).weights is None
    assert row.truncate(len(row) - 1).weights.equal(row.weights[:-1])


def test_rows_give_weights_of_any_size(tmp_path):
    marks = [0, 1, 0.5, 2, True, False]
    turns = [
        {"role": "user", "content": "q"},
        *({"role": "assistant", "content": "a", "weight": mark} for mark in marks),
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}))
    [example] = read_examples(str(tmp_path / "a.jsonl")).examples
    assert [turn.weight for turn in example.messages[1:]] == [0, 1, 0.5, 2, 1, 0]


# ---- answers that go on, and roles ---------------------------------------------------------------


@pytest.mark.parametrize(
    "begun, rest", [("The answer is", " 42."), ("The ", "answer"), ("  The", " end"), ("a\n", "\nb")]
)
def test_a_completion_goes_on_with_the_answer_that_its_prompt_begins(tokenizer_of, tmp_path, begun, rest):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": begun}]
    row = {"prompt": turns, "completion": [{"role": "assistant", "content": rest}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    [example] = read_examples(str(tmp_path / "a.jsonl")).examples
    template = template_of(tokenizer_of, THINKERS["plain"])
    [encoded] = template.encode_example(example)
    assert template.tokenizer.decode(encoded.answer_ids) == f"{rest}{END}"
    sent = template.encode_continued((ASK, Message("assistant", begun)))
    assert sent == encoded.prompt_ids and template.tokenizer.decode(sent).endswith(f"assistant\n{begun}")


def test_what_cannot_be_continued_is_refused(tokenizer_of):
    for style, turn in (("plain", Message("assistant", "")), ("cuts", Message("assistant", "<think>\nx</think>"))):
        with pytest.raises(DataError, match="how the answer begins"):
            template_of(tokenizer_of, THINKERS[style]).encode_continued((ASK, turn))


def test_roles_are_renamed(tmp_path):
    turns = [{"role": "Player", "content": "q"}, {"role": "narrator", "content": "a"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}))
    fields = field_names(RowOptions(role=("Player=user", "narrator=assistant")))
    [example] = read_examples(str(tmp_path / "a.jsonl"), fields).examples
    assert [turn.role for turn in example.messages] == ["user", "assistant"]
    with pytest.raises(DataError, match=r"role is 'Player'.*--role"):
        read_examples(str(tmp_path / "a.jsonl"))
    for wrong in ("narrator", "a=b=c", "narrator=storyteller"):
        with pytest.raises(ConfigError, match="OLD=NEW"):
            field_names(RowOptions(role=(wrong,)))
