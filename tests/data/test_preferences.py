"""Rows of preferences in every published form: read, encoded token for token, and what is wrong with them named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer, make_data

from nybble.data.preference_rows import EncodedPair, JudgedAnswer
from nybble.data.prepare import PreparedData, prepare
from nybble.data.readers import FieldNames
from nybble.data.row_kinds import ROW_KINDS
from nybble.data.template import ChatTemplate
from nybble.errors import ConfigError, DataError

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "2 + 2?"), ("assistant", "4"), ("assistant", "5"))
)
SYSTEM = {"role": "system", "content": "Count."}
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
ASKED = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
ENDS = ("4<|im_end|>", "5<|im_end|>")

PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, ASKED),
    "text, other names": ({"question": "2 + 2?", "chosen_response": "4", "rejected_response": "5"}, ASKED),
    "text, with a system column": (
        {"system": "Count.", "question": "2 + 2?", "chosen": "4", "rejected": "5"},
        f"<|im_start|>system\nCount.<|im_end|>\n{ASKED}",
    ),
    "an instruction and its subject": (
        {"instruction": "Add.", "input": "2 + 2?", "chosen": "4", "rejected": "5"},
        "<|im_start|>user\nAdd.\n\n2 + 2?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "conversations": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, ASKED),
    "conversations, several turns": (
        {"chosen": [*EARLIER, USER, GOOD], "rejected": [*EARLIER, USER, BAD]},
        f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n{ASKED}",
    ),
    "conversations as JSON text": ({"chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD])}, ASKED),
    "turns": (
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
        f"<|im_start|>system\nCount.<|im_end|>\n{ASKED}",
    ),
    "turns and text": ({"prompt": [USER], "chosen": "4", "rejected": "5"}, ASKED),
    "one turn each, ShareGPT": (
        {"conversations": [{"from": "human", "value": "2 + 2?"}]}
        | {side: {"from": "gpt", "value": text} for side, text in (("chosen", "4"), ("rejected", "5"))},
        ASKED,
    ),
    "UltraFeedback": (
        {
            "prompt": "2 + 2?",
            "prompt_id": "x",
            "chosen": [USER, GOOD],
            "rejected": [USER, BAD],
            "messages": [USER, GOOD],
        }
        | {"score_chosen": 8.5, "score_rejected": 2.0},
        ASKED,
    ),
    "HH": (
        {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"},
        ASKED,
    ),
    "OpenAI": (
        {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        ASKED,
    ),
}
JUDGED: dict[str, dict[str, Any]] = {
    "text": {"prompt": "2 + 2?", "completion": "4", "label": True},
    "turns": {"prompt": [USER], "completion": [GOOD], "label": True},
    "numbers as labels": {"question": "2 + 2?", "response": "4", "label": 1},
    "messages": {"messages": [USER, GOOD], "label": "true"},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}],
        "kto_tag": True,
    },
}


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(byte_tokenizer())


def read(path: Path, objective: str, template: ChatTemplate, *rows: Any, **options: Any) -> PreparedData:
    data = make_data(path / "rows.jsonl", rows)
    return prepare(
        str(data), template, kind=ROW_KINDS[objective], validation_fraction=0, **{"max_seq_len": 256} | options
    )


def found(data: PreparedData) -> dict[str, tuple[str, ...]]:
    rows = {finding.id: tuple(row.rpartition("/")[2] for row in finding.rows) for finding in data.audit.findings}
    return {id: where for id, where in rows.items() if id not in ("no-validation", "duplicates", "near-leak")}


@pytest.mark.parametrize("form", PAIRS)
def test_a_pair_becomes_two_documents(form: str, template: ChatTemplate, tmp_path: Path) -> None:
    """The prompt that chat would send, and each answer with its end of turn, of which alone is learnt."""
    row, prompt = PAIRS[form]
    (pair,) = read(tmp_path, "dpo", template, row).train
    assert isinstance(pair, EncodedPair)
    for document, answer in zip(pair.documents, ENDS, strict=True):
        ids = document.input_ids
        assert template.tokenizer.decode(ids[~document.supervised]) == f"{prompt}\n"
        assert template.tokenizer.decode(ids[document.supervised]) == answer
    assert pair.prompt_ids == template.encoder.encode(prompt)


@pytest.mark.parametrize("form", JUDGED)
def test_a_judged_answer_is_one_document_and_its_label(form: str, template: ChatTemplate, tmp_path: Path) -> None:
    other = {
        key: (not value if isinstance(value, bool) else 0 if value == 1 else "false" if value == "true" else value)
        for key, value in JUDGED[form].items()
    }
    data = read(tmp_path, "kto", template, JUDGED[form], other)
    good, bad = data.train
    assert isinstance(good, JudgedAnswer) and isinstance(bad, JudgedAnswer)
    assert (good.desirable, bad.desirable) == (True, False) and good.content != bad.content
    assert template.tokenizer.decode(good.input_ids[good.supervised]) == ENDS[0]
    assert not found(data)


def test_a_pair_is_a_good_answer_and_a_bad_one_to_kto(template: ChatTemplate, tmp_path: Path) -> None:
    data = read(tmp_path, "kto", template, PAIRS["text"][0])
    labels = [
        (row.desirable, template.tokenizer.decode(row.answer_ids))
        for row in data.train
        if isinstance(row, JudgedAnswer)
    ]
    assert labels == [(True, ENDS[0]), (False, ENDS[1])] and not found(data)


def test_bare_strings_stay_bare(tmp_path: Path) -> None:
    template = ChatTemplate(byte_tokenizer(), "none")
    (pair,) = read(tmp_path, "dpo", template, PAIRS["text"][0]).train
    assert isinstance(pair, EncodedPair)
    assert [template.tokenizer.decode(document.input_ids) for document in pair.documents] == [
        "2 + 2?" + end for end in ENDS
    ]


BAD_ROWS: dict[str, tuple[str, dict[str, Any], str]] = {
    "equal": ("dpo", {"prompt": "q", "chosen": "a", "rejected": "a"}, "equal-answers"),
    "equal conversations": ("dpo", {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "equal-answers"),
    "empty": ("dpo", {"prompt": "q", "chosen": "a", "rejected": " "}, "empty-answer"),
    "one ends early": ("dpo", {"prompt": "2 + 2?", "chosen": [USER, GOOD], "rejected": [USER]}, "empty-answer"),
    "other prompts": (
        "dpo",
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [*EARLIER, USER, BAD]},
        "different-prompts",
    ),
    "another prompt beside": (
        "dpo",
        {"prompt": "3?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        "different-prompts",
    ),
    "one with its prompt": ("dpo", {"prompt": "2 + 2?", "chosen": "4", "rejected": [USER, BAD]}, "different-prompts"),
    "no text": ("dpo", {"prompt": "q", "chosen": None, "rejected": "a"}, "not-text"),
    "a side missing": ("dpo", {"prompt": "q", "chosen": "a"}, "missing-column"),
    "unseen label": ("kto", {"prompt": "q", "completion": "a", "label": "maybe"}, "unknown-label"),
    "a number that is no label": ("kto", {"prompt": "q", "completion": "a", "label": 0.5}, "unknown-label"),
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_bad_rows_are_named_counted_and_left_out(what: str, template: ChatTemplate, tmp_path: Path) -> None:
    objective, bad, finding = BAD_ROWS[what]
    good = [{"prompt": f"{n}?", "chosen": f"{n}", "rejected": "no"} for n in range(12)]
    if objective == "kto":
        good = [{"prompt": f"{n}?", "completion": f"{n}", "label": n % 2 == 0} for n in range(12)]
    data = read(tmp_path, objective, template, *good, bad)
    assert found(data)[finding] == ("rows.jsonl:13",)
    assert data.audit.num_dropped == 1 and len(data.train) == 12
    data.audit.check()


def test_pairs_that_are_the_same_once_they_are_cut_are_left_out(template: ChatTemplate, tmp_path: Path) -> None:
    long = [{"prompt": "q", "chosen": "a" * 300 + end, "rejected": "a" * 300 + "!"} for end in "bc"]
    data = read(tmp_path, "dpo", template, *long, PAIRS["text"][0], max_seq_len=128)
    assert found(data)["too-long"] == ("rows.jsonl:1", "rows.jsonl:2") and len(data.train) == 1


def test_a_pair_that_is_cut_is_no_pair_without_an_end(template: ChatTemplate, tmp_path: Path) -> None:
    long = {"prompt": "q", "chosen": "a" * 300, "rejected": "b"}
    data = read(tmp_path, "dpo", template, long, PAIRS["text"][0], max_seq_len=128)
    assert found(data) == {"truncated": ("rows.jsonl:1",)} and data.audit.num_truncated == 1


def test_training_stops_where_nothing_would_be_learnt(template: ChatTemplate, tmp_path: Path) -> None:
    one_class = read(
        tmp_path, "kto", template, *({"prompt": f"{n}?", "completion": "x", "label": True} for n in range(3))
    )
    with pytest.raises(DataError, match=r"one-class: 3 x all answers are judged alike.*all are good"):
        one_class.audit.check()
    equal = read(tmp_path, "dpo", template, {"prompt": "q", "chosen": "a", "rejected": "a"})
    with pytest.raises(DataError, match=r"(?s)no-rows.*equal-answers: 1 x.*rows\.jsonl:1"):
        equal.audit.check()


@pytest.mark.parametrize(
    ("objective", "row", "advice"),
    [
        ("sft", {"prompt": "q", "chosen": "a", "rejected": "b"}, r"rows of preferences(?s:.*)--objective dpo"),
        ("dpo", {"prompt": "q", "completion": "a"}, r"without a chosen and a rejected answer(?s:.*)--objective sft"),
        ("orpo", {"prompt": "q", "completion": "a", "label": True}, r"without a chosen(?s:.*)--objective kto"),
        ("kto", {"prompt": "q", "completion": "a"}, r"without a label(?s:.*)--objective sft"),
    ],
)
def test_rows_of_another_objective_are_refused(
    objective: str, row: dict[str, Any], advice: str, template: ChatTemplate, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{advice}"):
        read(tmp_path, objective, template, row)
    if objective != "sft":
        with pytest.raises(DataError, match="builtin:pydoc: rows without"):
            prepare("builtin:pydoc", template, kind=ROW_KINDS[objective], max_seq_len=64)


def test_a_column_that_pairs_do_not_have_is_refused(template: ChatTemplate, tmp_path: Path) -> None:
    asked = {"ask": "2 + 2?", "chosen": "4", "rejected": "5"}
    (pair,) = read(tmp_path, "dpo", template, asked, fields=FieldNames(prompt="ask")).train
    assert pair.prompt_ids == template.encoder.encode(ASKED)
    with pytest.raises(ConfigError, match="leave --completion-field out"):
        read(tmp_path, "dpo", template, asked, fields=FieldNames(completion="chosen"))


def test_columns_are_those_that_are_named(template: ChatTemplate, tmp_path: Path) -> None:
    known = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "label": False}
    own = {"prompt": "2 + 2?", "Good one": "4", "worse": "5", "chosen": "6", "rejected": "7"}
    (pair,) = read(tmp_path, "dpo", template, own, fields=FieldNames(chosen="Good one", rejected="worse")).train
    (expected,) = read(tmp_path, "dpo", template, known).train
    assert torch.equal(pair.input_ids, expected.input_ids)
    (half,) = read(tmp_path, "dpo", template, own, fields=FieldNames(rejected="worse")).train  # with `chosen`
    assert template.tokenizer.decode(half.input_ids).count("6") == 1

    judged = {"prompt": "2 + 2?", "completion": "5", "liked": "false", "label": True}
    (answer,) = read(tmp_path, "kto", template, judged, fields=FieldNames(label="liked")).train
    assert isinstance(answer, JudgedAnswer) and not answer.desirable
    with pytest.raises(DataError, match="without a label"):
        read(tmp_path, "kto", template, judged, fields=FieldNames(label="voted"))


@pytest.mark.parametrize(
    ("objective", "fields", "option"),
    [
        ("sft", {"chosen": "chosen"}, "--chosen-field"),
        ("sft", {"label": "label"}, "--label-field"),
        ("dpo", {"label": "label"}, "--label-field"),
        ("kto", {"chosen": "chosen", "label": "label"}, "--label-field"),
        ("kto", {"text": "prompt"}, "--text-field"),
    ],
)
def test_no_name_of_a_column_is_ignored(
    objective: str, fields: dict[str, str], option: str, template: ChatTemplate, tmp_path: Path
) -> None:
    row = {"prompt": "q", "completion": "a", "chosen": "a", "rejected": "b", "label": True}
    with pytest.raises(ConfigError, match=rf"{option} is given.*\n?(?s:.*)leave {option} out"):
        read(tmp_path, objective, template, row, fields=FieldNames(**fields))
