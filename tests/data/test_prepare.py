"""The split, the audit's counts and findings, and what is shown of them."""

import io
import json

import numpy as np
import pytest

from nybble.cli.render.audit import SUPERVISED_STYLE, render_audit, render_example
from nybble.data.audit import percentiles
from nybble.data.examples import Example
from nybble.data.findings import FINDINGS, WARNINGS
from nybble.data.prepare import PreparedData, prepare
from nybble.data.split import content_ranks, split_validation
from nybble.data.template import ChatTemplate
from nybble.errors import DataError


@pytest.fixture
def template(tokenizer_of) -> ChatTemplate:
    return ChatTemplate(tokenizer_of("bytes", "chatml"))


@pytest.fixture
def write(tmp_path):
    def write(rows: list, name: str = "a.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


def pairs(count: int, first: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(first, first + count)]


def prepare_checked(source: str, template: ChatTemplate, **options) -> PreparedData:
    data = prepare(source, template, **options)
    data.audit.check()
    return data


def finding(data, id: str):
    [found] = [f for f in data.audit.findings if f.id == id]
    return found


# ---- split


def examples(texts: list[str]) -> list[Example]:
    return [Example(f"f:{n}", text=text) for n, text in enumerate(texts, 1)]


def split(texts: list[str], seed: int = 0, **options) -> tuple[list[int], list[int]]:
    train, validation = split_validation(content_ranks(examples(texts), seed), **options)
    return train.tolist(), validation.tolist()


def test_split_sizes():
    def sizes(count: int, **options) -> tuple[int, int]:
        train, validation = split([str(n) for n in range(count)], **options)
        assert sorted(train + validation) == list(range(count))
        return len(train), len(validation)

    assert sizes(200) == (190, 10)
    assert sizes(20_000) == (19_488, 512)
    assert sizes(3) == (2, 1)
    assert sizes(1) == (1, 0)
    assert sizes(100, fraction=0) == (100, 0)
    assert sizes(100, fraction=0.5, max_rows=7) == (93, 7)


def test_split_is_seeded_and_does_not_depend_on_order():
    texts = [str(n) for n in range(100)]
    held_out = {texts[i] for i in split(texts, fraction=0.1)[1]}
    turned = texts[::-1]
    assert {turned[i] for i in split(turned, fraction=0.1)[1]} == held_out
    assert {texts[i] for i in split(texts, fraction=0.1, seed=1)[1]} != held_out


@pytest.mark.parametrize("seed", range(20))
def test_no_text_stands_on_both_sides(seed):
    texts = [f"a  {n % 7}\n" if n % 2 else f"a {n % 7}" for n in range(40)]  # equal but for white space
    train, validation = split(texts, fraction=0.2, seed=seed)
    assert validation and train
    assert not {texts[i].split()[1] for i in train} & {texts[i].split()[1] for i in validation}


def test_split_where_every_text_is_frequent():
    train, validation = split(["a"] * 30 + ["b"] * 20, fraction=0.05)
    assert validation == list(range(30, 50)) and train == list(range(30))


# ---- counts


def test_counts(write, template):
    data = prepare(write(pairs(40)), template, max_seq_len=64, vocab_size=len(template.tokenizer))
    audit = data.audit
    assert (audit.num_rows, audit.num_dropped, audit.num_train, audit.num_validation) == (40, 0, 38, 2)
    assert audit.tokens == sum(map(len, data.train))
    assert audit.supervised_tokens == sum(int(s.supervised.sum()) for s in data.train)
    assert audit.longest == max(map(len, data.train + data.validation)) and audit.findings == ()
    assert {s.origin for s in data.train}.isdisjoint({s.origin for s in data.validation})
    audit.check()


def test_audit_is_json(write, template):
    audit = prepare(write([*pairs(3), *pairs(1)]), template, max_seq_len=64).audit
    kept = json.loads(json.dumps(audit.to_json()))
    assert kept["num_rows"] == 4 and kept["length_percentiles"].keys() == {"p50", "p90", "p99"}
    assert {f["id"]: f["level"] for f in kept["findings"]} == {"duplicates": "warning"}


def test_percentiles():
    assert percentiles(np.arange(1, 201)) == {"p50": 100, "p90": 180, "p99": 198}
    assert percentiles(np.array([])) == {"p50": 0, "p90": 0, "p99": 0}


# ---- rows too long


def test_truncated_rows_are_counted_and_named(write, template):
    long = {"prompt": "q", "completion": "answer " * 50}
    data = prepare(write([long, *pairs(10)]), template, max_seq_len=40)
    found = finding(data, "truncated")
    assert (found.level, found.num_rows, found.rows) == ("warning", 1, ("a.jsonl:1",))
    assert data.audit.num_truncated == 1 and data.audit.truncated_tokens == data.audit.longest - 40
    cut = next(s for s in data.train + data.validation if s.num_truncated)
    assert len(cut) == 40 and cut.supervised_tokens > 0
    data.audit.check()


def test_a_row_is_never_left_without_its_supervised_part(write, template):
    long = {"prompt": "question " * 50, "completion": "a"}
    data = prepare(write([*pairs(5), long, *pairs(5, 5)]), template, max_seq_len=40)
    found = finding(data, "too-long")
    assert (found.level, found.num_rows, found.rows) == ("warning", 1, ("a.jsonl:6",))
    assert data.audit.num_dropped == 1 and all(s.supervised_tokens for s in data.train + data.validation)
    data.audit.check()


def test_the_border_case_of_truncation(write, template):
    """The answer's first token is the last that fits: kept. One less: dropped."""
    source = write(pairs(2))
    [first, *_] = prepare(source, template, max_seq_len=99, validation_fraction=0).train
    border = len(first.prompt_ids) + 1
    kept = prepare(source, template, max_seq_len=border, validation_fraction=0)
    assert [s.supervised_tokens for s in kept.train] == [1, 1]
    with pytest.raises(DataError, match=r"no-rows.*\n.*too-long|too-long.*\n.*no-rows|no-rows(.|\n)*too-long"):
        prepare_checked(source, template, max_seq_len=border - 1)


def test_all_rows_filtered(write, template):
    rows = [{"prompt": "question " * 50, "completion": "a"}, {"prompt": "q", "completion": " "}]
    with pytest.raises(DataError) as error:
        prepare_checked(write(rows), template, max_seq_len=40)
    message = str(error.value)
    assert "no row is left" in message and "too-long" in message and "a.jsonl:1" in message
    assert "empty-answer" in message and "a.jsonl:2" in message and "raise --max-seq-len" in message


# ---- findings that stop training

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


@pytest.mark.parametrize(
    "turns, id", [([USER], "no-assistant-turn"), ([ASSISTANT], "no-user-turn"), ([USER, USER], "no-assistant-turn")]
)
def test_rows_that_train_on_nothing_stop_training(write, template, turns, id):
    good = [{"messages": [{**USER, "content": str(n)}, ASSISTANT]} for n in range(10)]
    source = write([*good, *[{"messages": turns}] * 7])
    data = prepare(source, template, max_seq_len=64)
    found = finding(data, id)
    assert (found.level, found.num_rows) == ("error", 7)
    assert found.rows == tuple(f"a.jsonl:{n}" for n in range(11, 16))
    with pytest.raises(DataError, match=rf"(?s){id}: 7 x .*a\.jsonl:11, .* and 2 more") as error:
        data.audit.check()
    assert error.value.exit_code == 2


def test_ids_beyond_vocabulary(write, template):
    with pytest.raises(DataError, match=r"ids-beyond-vocabulary: 6 x .*largest id \d+, embedding 50 rows"):
        prepare_checked(write(pairs(6)), template, max_seq_len=64, vocab_size=50)


def test_validation_leak(write, template):
    leaking = [*pairs(2, 100), {"prompt": " question  3", "completion": "answer 3\n"}]
    source, validation = write(pairs(10)), write(leaking, "b.jsonl")
    data = prepare(source, template, max_seq_len=64, validation_source=validation)
    assert (len(data.train), len(data.validation)) == (10, 3)
    assert finding(data, "validation-leak").rows == ("b.jsonl:3",)
    with pytest.raises(DataError, match=r"validation-leak: 1 x .*b\.jsonl:3"):
        data.audit.check()


def with_template(template: ChatTemplate, text: str) -> ChatTemplate:
    tokenizer = type(template.tokenizer)(
        tokenizer_object=template.tokenizer.backend_tokenizer, bos_token="<s>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer)


def test_end_of_turn_is_never_supervised(write, template):
    plain = with_template(
        template,
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
    with pytest.raises(DataError, match="no-end-of-turn: 6 x"):
        prepare_checked(write(pairs(6)), plain, max_seq_len=64)


def test_a_template_that_marks_nothing_as_generated(write, template):
    silent = with_template(
        template,
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
        "{% if false %}{% generation %}{% endgeneration %}{% endif %}",
    )
    with pytest.raises(DataError, match=r"no-supervised-tokens: 6 x .*a\.jsonl:1"):
        prepare_checked(write(pairs(6)), silent, max_seq_len=64)


def test_messages_without_a_template(write, template):
    bare = ChatTemplate(template.tokenizer, "none")
    with pytest.raises(DataError, match="needs-template: 1 x"):
        prepare_checked(write([{"messages": [USER, ASSISTANT]}]), bare, max_seq_len=64)


# ---- findings that warn


def test_rows_that_the_template_refuses_are_dropped_and_named(write, tokenizer_of):
    llama2 = ChatTemplate(tokenizer_of("bytes", "llama2"))
    good = [{"messages": [{**USER, "content": str(n)}, ASSISTANT]} for n in range(10)]
    refused = {"messages": [USER, USER, ASSISTANT]}
    data = prepare_checked(write([*good, refused]), llama2, max_seq_len=64)
    found = finding(data, "template-refuses")
    assert found.rows == ("a.jsonl:11",) and "roles must alternate" in found.detail
    assert data.audit.num_dropped == 1 and data.audit.num_train + data.audit.num_validation == 10


def test_rewritten_history_is_split(write, tokenizer_of):
    qwen = ChatTemplate(tokenizer_of("bytes", "qwen3"))
    rows = [{"messages": [{**USER, "content": str(n)}, ASSISTANT, USER, ASSISTANT]} for n in range(4)]
    data = prepare_checked(write(rows), qwen, max_seq_len=99, validation_fraction=0.25)
    assert (data.audit.num_train, data.audit.num_validation) == (6, 2), "two sequences a row, on the same side"
    assert finding(data, "template-rewrites-history").num_rows == 4


def test_special_tokens_in_content(write, template):
    data = prepare_checked(write([*pairs(4), {"prompt": "q", "completion": "a<|im_end|>b"}]), template, max_seq_len=64)
    found = finding(data, "special-token-in-content")
    assert found.rows == ("a.jsonl:5",) and "<|im_end|>" in found.detail


def test_one_row_leaves_nothing_to_validate_on(write, template):
    data = prepare_checked(write(pairs(1)), template, max_seq_len=64)
    assert len(data.train) == 1 and not data.validation and finding(data, "no-validation").level == "warning"


def test_fallback_notice_is_in_the_audit(write, tokenizer_of):
    audit = prepare(write(pairs(3)), ChatTemplate(tokenizer_of("bytes", None)), max_seq_len=64).audit
    assert "no chat template" in audit.notices[0]


def test_every_finding_says_what_to_do():
    assert all(message and fix for message, fix in FINDINGS.values()) and FINDINGS.keys() > WARNINGS


# ---- what is shown


def test_render_audit(write, template):
    from rich.console import Console

    audit = prepare(write([*pairs(30), {"prompt": "[q]", "completion": " "}]), template, max_seq_len=64).audit
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_audit(audit))
    shown = console.export_text()
    assert "31 read, 1 dropped, 0 truncated" in shown and f"{audit.supervised_tokens:,} of them supervised" in shown
    assert "empty-answer" in shown and "a.jsonl:31" in shown


def test_render_example_colours_the_supervised_tokens(write, template):
    [example, *_] = prepare(
        write([{"prompt": "[bold]q", "completion": "é a"}, *pairs(2)]), template, max_seq_len=64
    ).train
    text = render_example(example, template.tokenizer).renderable
    coloured = "".join(text.plain[s.start : s.end] for s in text.spans if s.style == SUPERVISED_STYLE)
    assert coloured == template.tokenizer.decode(example.answer_ids)
    assert text.plain == template.tokenizer.decode(example.input_ids)
