"""Rows with several labels a text, and with labels of tokens: how they are read, laid on tokens, and what is wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer, make_data
from tiny_encoders import make_encoder, word_pieces
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import nybble
from nybble.data.text_rows import TextRow
from nybble.data.token_labels import MarkedExample, Span, encode_marked, encode_text, encode_words
from nybble.errors import DataError


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "bert")


HELD_OUT = {
    "tokens": {"tokens": ["held"], "ner_tags": ["O"]},
    "spans": {"text": "held", "spans": []},
    "label": {"text": "held", "label": "x"},
    "labels": {"text": "held", "labels": ["x"]},
}


def audited(model: Path, folder: Path, rows: list[dict[str, Any]]) -> Any:
    """What is said of rows beside a held-out one of their form."""
    held_out = next(row for column, row in HELD_OUT.items() if column in rows[0])
    files = {"data": make_data(folder / "r.jsonl", rows), "validation_data": make_data(folder / "v.jsonl", [held_out])}
    return nybble.check_data(model=model, objective="classify", **files)


def test_numbers_of_tables_are_numbers(encoder: Path, tmp_path: Path) -> None:
    """A CSV file has text alone: fractions there are learnt as those of JSON are, and a whole number is one class."""
    for labels, said in (
        (("0.25", "-1.50", "2.0e-1"), "Labels are numbers, from -1.5 to 0.25: a number is learnt."),
        (("10", "9", "007"), "3 classes: 007 2 (held out 2), 10 2 (held out 2), 9 2 (held out 2)."),
        (("10", "9", "8"), "3 classes: 8 2 (held out 2), 9 2 (held out 2), 10 2 (held out 2)."),
    ):
        for name in ("train", "held"):
            rows = (f"{name} {n},{label}\n" for n, label in enumerate(labels * 2))
            (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(rows))
        files = {"data": tmp_path / "train.csv", "validation_data": tmp_path / "held.csv"}
        assert said in nybble.check_data(model=encoder, objective="classify", **files).audit.notices
    both = [{"text": str(n), "label": (1, "1", 2)[n % 3]} for n in range(6)]
    notices = audited(encoder, tmp_path, both).audit.notices
    assert any("1 4 (held out 0)" in said for said in notices), notices


# ---- words with tags -----------------------------------------------------------------------------


def test_words_are_laid_on_tokens_as_run_ner_does_it() -> None:
    """transformers' examples/pytorch/token-classification: the first token of each word has its label, the others and
    the special ones -100."""
    tokenizer, words = word_pieces(), ["unbelievable", "Anna", "saw", "x", "unseen"]
    theirs = tokenizer(words, is_split_into_words=True)
    expected, before = [], None
    for word in theirs.word_ids():
        expected.append(-1 if word is None or word == before else word)
        before = word
    row = encode_words(tokenizer, words, "row")
    assert row.input_ids.tolist() == theirs["input_ids"] and row.units is not None
    assert row.units.tolist() == expected and -1 in expected[1:-1]


def test_words_are_written_as_in_a_text() -> None:
    """Byte-level tokenizers write a word otherwise behind a space; so do those that put a mark there."""
    marks = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "a": 2, "b": 3, "?": 4}, unk_token="?"))
    marks.pre_tokenizer = pre_tokenizers.Metaspace()
    for tokenizer in (byte_tokenizer(), PreTrainedTokenizerFast(tokenizer_object=marks)):
        row = encode_words(tokenizer, ["a", "b", "a"], "row")
        assert row.input_ids.tolist() == tokenizer("a b a")["input_ids"]
        assert row.units is not None and sorted(unit for unit in row.units.tolist() if unit >= 0) == [0, 1, 2]


def test_tags_of_words_that_have_none_are_not_learnt(encoder: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["ab", "c", "d"], "ner_tags": ["B-X", -100, "O"]} for _ in range(3)]
    data = audited(encoder, tmp_path, rows)
    (row, *_) = data.train
    assert isinstance(row, TextRow) and row.token_labels == ("B-X", "O") and row.supervised_tokens == 2
    assert data.audit.supervised_tokens == 6
    cut = row.truncate(4)
    assert len(cut) == 4 and cut.token_labels == ("B-X",)  # a token before and behind the text stays


def test_names_of_tags_come_from_data_sets_that_have_them(encoder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    kind = datasets.List(datasets.ClassLabel(names=["O", "B-X", "I-X"]))
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": kind})
    columns = {"tokens": [["a", "b"], ["c"]] * 4, "ner_tags": [[1, 2], [0]] * 4}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "rows.parquet")
    data = nybble.check_data(model=encoder, data=str(tmp_path / "rows.parquet"), objective="classify")
    assert any("3 labels, entities are told: B-X " in notice for notice in data.audit.notices)


# ---- texts with entities -------------------------------------------------------------------------


class Template:
    tokenizer = byte_tokenizer()


def marked(text: str, *spans: tuple[int, int, str]) -> list[str]:
    example = MarkedExample("row", text=text, spans=tuple(Span(*span) for span in spans))
    return [str(label) for label in encode_marked(Template(), example).labels]  # type: ignore[arg-type]


def test_entities_are_laid_on_tokens() -> None:
    text = "in Genève, x"
    tags = marked(text, (3, 9, "LOC"))
    inside = len("Genève".encode())
    assert tags == ["O"] * 3 + ["B-LOC"] + ["I-LOC"] * (inside - 1) + ["O"] * 3
    row, places = encode_text(Template.tokenizer, text, "row")
    assert len(row) == len(places) == len(tags) and text[slice(*places[3])] == "G"


def test_an_entity_within_a_token_is_named(tmp_path: Path) -> None:
    class Words:
        tokenizer = word_pieces()

    example = MarkedExample("row", text="Anna saw x", spans=(Span(0, 2, "PER"),))
    with pytest.raises(DataError, match="begins or ends within the token 0-4, 'Anna'"):
        encode_marked(Words(), example)  # type: ignore[arg-type]


# ---- what is wrong -------------------------------------------------------------------------------

TAGGED = {"tokens": ["ab", "c"], "ner_tags": ["B-X", "O"]}
MARKED = {"text": "ab c", "spans": [{"start": 0, "end": 2, "label": "X"}]}
SEVERAL = {"text": "ab", "labels": ["x", "y"]}


@pytest.mark.parametrize(
    ("good", "bad", "finding", "words"),
    [
        (TAGGED, {"ner_tags": ["O"]}, "odd-tags", "2 words in 'tokens', 1 tags in 'ner_tags'"),
        (TAGGED, {"ner_tags": "B-X O"}, "odd-tags", "'ner_tags' is text, and a list is needed"),
        (TAGGED, {"ner_tags": ["O", None]}, "odd-tags", "tag 2 in 'ner_tags' is null"),
        (TAGGED, {"tokens": ["ab", 0]}, "odd-tags", "word 2 in 'tokens' is a number"),
        (TAGGED, {"ner_tags": ["B-X", "PER"]}, "unknown-tag", "'PER'"),
        (TAGGED, {"ner_tags": ["O", "I-X"]}, "stray-inside", ""),
        (TAGGED, {"tokens": ["ab", ""]}, "word-without-token", ""),
        (TAGGED, {"ner_tags": [-100, -100]}, "missing-label", "not one word"),
        (MARKED, {"spans": [[0, 9, "X"]]}, "odd-span", "span 1 is 0-9 of a text of 4 characters"),
        (MARKED, {"spans": [[0, 2, "X"], [1, 4, "Y"]]}, "odd-span", "X at 0-2 and Y at 1-4 overlap"),
        (MARKED, {"spans": [{"start": 0, "label": "X"}]}, "odd-span", "start, end and one of"),
        (MARKED, {"spans": [[2, 3, "X"]]}, "odd-span", "white space"),
        (MARKED, {"spans": "0-2"}, "odd-span", "'spans' is text"),
        (SEVERAL, {"labels": "x, y"}, "odd-labels", "'labels' is text, and the first row's is a list"),
        (SEVERAL, {"labels": [0.0, 1.0]}, "odd-labels", "no name and no whole number"),
        (SEVERAL, {"labels": [0, 1, 0]}, "odd-labels", "vectors of 0 and 1 are not read"),
        (SEVERAL, {"labels": None}, "missing-label", "has an empty list"),
        ({"text": "ab", "label": 0.5}, {"label": float("inf")}, "missing-label", "'label' is inf"),
        ({"text": "ab", "label": 0.5}, {"label": "-1.0e39"}, "missing-label", "'label' is -1e+39"),
        ({"text": "ab", "label": "x"}, {"label": ["x", "y"]}, "odd-labels", "the first row's is one label"),
    ],
)
def test_what_is_wrong_is_named(good: dict, bad: dict, finding: str, words: str, encoder: Path, tmp_path: Path) -> None:
    data = audited(encoder, tmp_path, [good, good, good | bad, good])
    found = next(each for each in data.audit.findings if each.id == finding)
    assert found.rows == ("r.jsonl:3",) and found.num_rows == 1 and words in found.detail


def test_texts_may_have_no_label(encoder: Path, tmp_path: Path) -> None:
    rows = [SEVERAL | {"text": f"t {n}", "labels": [["x"], [], ["y", "x"]][n % 3]} for n in range(9)]
    audit = audited(encoder, tmp_path, rows).audit
    assert any("2 labels: x 6 (held out 1), y 3 (held out 0); 3 (held out 0) have none" in n for n in audit.notices)
    assert not any(found.level == "error" for found in audit.findings)
    bare = audited(encoder, tmp_path, [row | {"labels": []} for row in rows]).audit
    assert next(found for found in bare.findings if found.id == "one-label").detail == "none has a label"


def test_rows_of_two_forms_are_named(encoder: Path, tmp_path: Path) -> None:
    other = make_data(tmp_path / "o.jsonl", [TAGGED])
    data = nybble.check_data(
        model=encoder, data=[str(make_data(tmp_path / "s.jsonl", [SEVERAL] * 3)), str(other)], objective="classify"
    )
    found = next(found for found in data.audit.findings if found.id == "mixed-forms")
    assert found.level == "error" and found.rows == ("o.jsonl:1",)


def test_words_and_their_units_go_to_the_disk_and_back() -> None:
    import pickle

    row = encode_words(byte_tokenizer(), ["ab", "c"], "row")
    again = pickle.loads(pickle.dumps(row))
    assert torch.equal(again.units, row.units) and again.content == row.content
