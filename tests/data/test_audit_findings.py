"""Findings about many rows at once, near-duplicates, and accepting findings by name."""

import itertools
import json
import random

import numpy as np
import pytest

from nybble.data.findings import FINDINGS, NEVER_ALLOWED
from nybble.data.near_duplicates import near_duplicates
from nybble.data.plots import draw_lengths
from nybble.data.prepare import prepare
from nybble.data.template import ChatTemplate
from nybble.errors import ConfigError, DataError

WORDS = ("the", "a", "dog", "cat", "house", "tree", "runs", "sits", "sings", "blue", "green", "old", "new", "after")


def sentence(draw: random.Random, length: int = 60) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(length))


@pytest.fixture
def audit_of(tokenizer_of, tmp_path):
    """audit_of(rows, validation_rows, **options)"""

    def audit(rows, validation=None, **options):
        paths = {}
        for name, content in (("train", rows), ("validation", validation or [])):
            paths[name] = tmp_path / f"{name}.jsonl"
            paths[name].write_text("".join(json.dumps(row) + "\n" for row in content))
        source = str(paths["validation"]) if validation else None
        template = ChatTemplate(tokenizer_of("bytes", "chatml"))
        return prepare(str(paths["train"]), template, max_seq_len=4096, validation_source=source, **options).audit

    return audit


def found(audit):
    return {finding.id: finding for finding in audit.findings}


def test_near_duplicates_are_those_of_an_exact_comparison_of_all_pairs():
    draw = random.Random(0)
    texts = [sentence(draw) for _ in range(60)]
    others = []
    for changed in range(20):  # words replaced: similarities from 1 down to nothing
        words = texts[changed].split()
        for _ in range(changed // 2):
            words[draw.randrange(len(words))] = "elsewhere"
        others.append(" ".join(words))

    def shingles(text):
        words = text.split()
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    def similarity(a, b):
        return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))

    pairs = itertools.product(enumerate(texts), enumerate(others))
    expected = {(i, j) for (i, a), (j, b) in pairs if similarity(a, b) >= 0.8}
    assert 2 < len(expected) < 18
    assert set(near_duplicates(texts, others)) == expected


def test_case_and_punctuation_do_not_hide_a_duplicate_and_empty_texts_are_none():
    assert list(near_duplicates(["Hello there, you!", ""], ["hello THERE you", "", "..."])) == [(0, 0)]


def test_a_nearly_equal_validation_row_is_a_warning_that_names_both(audit_of):
    draw = random.Random(1)
    rows = [{"prompt": sentence(draw), "completion": f"Answer {n}."} for n in range(12)]
    near = {"prompt": rows[4]["prompt"] + " indeed", "completion": rows[4]["completion"]}
    finding = found(audit_of(rows, [near, {"prompt": sentence(draw), "completion": "c"}]))["near-leak"]
    assert (finding.level, finding.rows) == ("warning", ("validation.jsonl:1",))
    assert "validation.jsonl:1 is like train.jsonl:5" in finding.detail
    assert "near-leak" not in found(audit_of(rows, [rows[4]])), "an exact one is a leak, and named once"


def test_one_answer_for_most_rows_is_a_warning(audit_of):
    draw = random.Random(2)
    rows = [{"prompt": sentence(draw, 9), "completion": "yes" if n % 3 else f"no {n}"} for n in range(30)]
    finding = found(audit_of(rows))["same-answer"]
    assert finding.level == "warning" and "'yes'" in finding.detail
    assert "same-answer" not in found(
        audit_of([*rows[:10], *({**row, "completion": str(n)} for n, row in enumerate(rows))])
    )


EMPTY = {"prompt": "Say nothing.", "completion": " "}
LONG = {"prompt": "word " * 1000, "completion": "b"}
NO_ANSWER = {"messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize("lost, id", [(EMPTY, "empty-answer"), (LONG, "too-long")])
@pytest.mark.parametrize("count, stops", [(3, False), (4, True)])
def test_more_than_a_tenth_of_the_rows_is_not_lost_unasked_whatever_loses_them(audit_of, lost, id, count, stops):
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}!"} for n in range(30 - count)] + [lost] * count
    audit = audit_of(rows)
    assert found(audit)[id].num_rows == count
    if not stops:
        return audit.check()
    with pytest.raises(DataError, match=rf"(?s)many-dropped: 4 x .*of 30: 4 by {id}.*--allow many-dropped$") as error:
        audit.check()
    assert f"{id}: {found(audit)[id].fix}" in str(error.value), "what took them out is said too"
    audit_of(rows, allow=("many-dropped",)).check()
    return None


def test_rows_lost_to_several_things_are_counted_together(audit_of):
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}!"} for n in range(26)]
    audit = audit_of([*rows, EMPTY, EMPTY, LONG, LONG])
    assert found(audit)["many-dropped"].detail == "of 30: 2 by empty-answer, 2 by too-long"
    assert audit.num_dropped == 4


def test_odd_rows_are_dropped_told_all_at_once_by_kind_and_line(audit_of):
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}!"} for n in range(60)]
    rows[7]["completion"] = rows[30]["completion"] = None
    rows[40]["completion"] = [{"role": "narrator", "content": "x"}]
    del rows[50]["completion"]
    audit = audit_of(rows)
    audit.check()
    odd = {f.id: f for f in audit.findings if f.id in ("missing-column", "not-text", "odd-turn")}
    assert {id: (f.level, f.rows) for id, f in odd.items()} == {
        "missing-column": ("warning", ("train.jsonl:51",)),
        "not-text": ("warning", ("train.jsonl:8", "train.jsonl:31")),
        "odd-turn": ("warning", ("train.jsonl:41",)),
    }
    assert odd["not-text"].detail == "'completion' is null"
    assert (audit.num_rows, audit.num_dropped, audit.num_train + audit.num_validation) == (60, 4, 56)


def test_damage_to_a_file_stops_training_however_little_of_it_is_seen(audit_of):
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}!"} for n in range(60)]
    for damage in ([], {"prompt": "a", "completion": "b\ud83d"}):
        with pytest.raises(DataError, match=r"(?s)unreadable-row: 1 x .*:61 .*--allow unreadable-row$"):
            audit_of([*rows, damage]).check()
    audit_of([*rows, damage], allow=("unreadable-row",)).check()


@pytest.mark.parametrize(
    "turn, id",
    [
        ({"content": [{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}]}, "beyond-text"),
        ({"content": "a", "reasoning": [{"type": "image"}]}, "beyond-text"),
        ({"content": "a", "weight": -0.5}, "unread-weight"),
        ({"content": "a", "weight": 1, "train": False}, "unread-weight"),
    ],
)
def test_one_row_that_says_more_than_nybble_learns_stops_training(audit_of, turn, id):
    """However few they are: leaving out tools, pictures or weights changes what is learnt."""
    rows = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", **turn}]} for n in range(60)]
    for n, row in enumerate(rows):
        row["messages"][1] = row["messages"][1] if n == 7 else {"role": "assistant", "content": f"{n}!"}
    with pytest.raises(DataError, match=rf"(?s){id}: 1 x .*train\.jsonl:8 \(turn 2 has .*--allow {id}$"):
        audit_of(rows).check()
    audit = audit_of(rows, allow=(id,))
    audit.check()
    assert audit.num_dropped == 1


def test_too_many_odd_rows_stop_training_told_all_at_once(audit_of):
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}!" if n % 3 else None} for n in range(30)]
    del rows[1]["completion"]
    with pytest.raises(DataError, match=r"(?s)many-dropped: 11 x .*10 by not-text.*--allow many-dropped$") as error:
        audit_of(rows).check()
    assert "train.jsonl:1, train.jsonl:4" in str(error.value) and "missing-column: 1 x" in str(error.value)
    audit = audit_of(rows, allow=("many-dropped",))
    audit.check()
    assert (audit.num_dropped, audit.num_train + audit.num_validation) == (11, 19)


def test_columns_that_nothing_reads_are_counted_and_stop_where_they_teach(audit_of):
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}!", "id": n, "weight": n % 2} for n in range(20)]
    audit = audit_of(rows)
    assert found(audit)["unread-columns"].level == "warning" and "'id' in 20" in found(audit)["unread-columns"].detail
    assert (found(audit)["unread-lesson"].level, found(audit)["unread-lesson"].num_rows) == ("error", 10)
    with pytest.raises(DataError, match=r"(?s)unread-lesson: 10 x .*'weight' in 10.*--allow unread-lesson"):
        audit.check()
    audit_of(rows, allow=("unread-lesson",)).check()


def test_numbers_that_became_text_are_counted_and_shown(audit_of):
    audit = audit_of([{"prompt": f"Say {n}.", "completion": n} for n in range(20)])
    audit.check()
    assert found(audit)["number-as-text"].num_rows == 20
    assert found(audit)["number-as-text"].detail == "'completion': 0 is read as '0'"


def test_nothing_is_offered_that_cannot_help(audit_of):
    """With all rows lost, accepting what took them out would leave nothing to train on."""
    with pytest.raises(DataError, match="no-rows") as error:
        audit_of([NO_ANSWER] * 12).check()
    assert "no-assistant-turn" in str(error.value) and "--allow" not in str(error.value)


def test_a_leak_can_be_accepted_and_other_errors_still_stop(audit_of):
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}!"} for n in range(12)]
    with pytest.raises(DataError, match="--allow validation-leak"):
        audit_of(rows, rows[:1]).check()
    audit_of(rows, rows[:1], allow=("validation-leak",)).check()
    with pytest.raises(DataError, match="ids-beyond-vocabulary"):
        audit_of(rows, rows[:1], allow=("validation-leak",), vocab_size=5).check()


def test_a_huge_row_is_an_error_that_names_it(audit_of):
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}!"} for n in range(12)]
    rows.insert(3, {"prompt": "a", "completion": "b" * 1_000_001})
    audit = audit_of(rows)
    assert found(audit)["huge-row"].rows == ("train.jsonl:4",) and audit.num_dropped == 1
    with pytest.raises(DataError, match="huge-row"):
        audit.check()


@pytest.mark.parametrize("id", ["nothing", *NEVER_ALLOWED])
def test_only_findings_that_can_be_accepted_are(id, audit_of):
    with pytest.raises(ConfigError, match=rf"{id}.*(?s:.*)validation-leak"):
        audit_of([{"prompt": "a", "completion": "b"}], allow=(id,))
    assert set(NEVER_ALLOWED) <= FINDINGS.keys()


def test_the_lengths_are_a_picture(tmp_path):
    draw_lengths(np.array([3, 5, 9, 2000]), 1024, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
