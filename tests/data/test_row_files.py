"""What a file is, told from its bytes; several files; and reading on behind rows that cannot be read."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from nybble.data.field_names import FieldNames
from nybble.data.readers import read_examples
from nybble.errors import DataError

PAIRS = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(5)]
LINES = "".join(json.dumps(pair) + "\n" for pair in PAIRS)
FRENCH = [{"prompt": "Où est le café ?", "completion": "Là, près du marché."}, {"prompt": "a", "completion": "b"}]


def place(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def said(result) -> list[tuple[str, str]]:
    return [(example.prompt, example.completion) for example in result.examples]


EXPECTED = [(pair["prompt"], pair["completion"]) for pair in PAIRS]


# ---- forms of JSON


@pytest.mark.parametrize("suffix", ("jsonl", "json", "ndjson"))
@pytest.mark.parametrize(
    "text, lines",
    [
        (LINES, [1, 2, 3, 4, 5]),
        (json.dumps(PAIRS), [1] * 5),
        (json.dumps(PAIRS, indent=1), [2, 6, 10, 14, 18]),
        (json.dumps({"about": {"rows": 5}, "ids": [1, 2], "data": PAIRS}, indent=1), None),
        ("\n".join(json.dumps(pair, indent=2) for pair in PAIRS), [1, 5, 9, 13, 17]),
        ("\n\n".join(json.dumps(pair, indent=2) for pair in PAIRS), [1, 6, 11, 16, 21]),
    ],
)
def test_the_form_of_json_is_told_from_the_text(tmp_path, suffix, text, lines):
    place(tmp_path, {f"a.{suffix}": text})
    result = read_examples(str(tmp_path / f"a.{suffix}"))
    assert said(result) == EXPECTED and not result.odd
    if lines is not None:
        assert [example.origin for example in result.examples] == [f"a.{suffix}:{line}" for line in lines]


@pytest.mark.parametrize("indent", (None, 2))
@pytest.mark.parametrize("suffix", ("jsonl", "json"))
def test_one_row_alone_is_a_row(tmp_path, suffix, indent):
    """Its turns are not taken for rows."""
    row = {"id": 1, "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    place(tmp_path, {f"a.{suffix}": json.dumps(row, indent=indent) + "\n"})
    [example] = read_examples(str(tmp_path / f"a.{suffix}")).examples
    assert [turn.content for turn in example.messages] == ["hi", "yo"]


def test_rows_under_the_name_of_turns_are_rows(tmp_path):
    row = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
    place(tmp_path, {"a.json": json.dumps({"conversations": [row, row]})})
    assert len(read_examples(str(tmp_path / "a.json")).examples) == 2


def test_behind_a_damaged_row_of_several_lines_reading_goes_on(tmp_path):
    rows = [json.dumps(pair, indent=2) for pair in PAIRS]
    rows[2] = rows[2].replace('"completion"', "completion")
    place(tmp_path, {"a.jsonl": "\n".join(rows)})
    result = read_examples(str(tmp_path / "a.jsonl"))
    assert said(result) == EXPECTED[:2] + EXPECTED[3:]
    assert [error.origin for error in result.odd] == ["a.jsonl:9"]


def test_a_number_that_is_too_long_to_count_with_does_not_matter_where_nothing_reads_it(tmp_path):
    text = LINES.replace('{"prompt"', '{"id": ' + "9" * 5000 + ', "prompt"', 1)
    for name, content in (("a.jsonl", text), ("a.json", "[" + text.strip().replace("\n", ",") + "]")):
        place(tmp_path, {name: content})
        assert said(read_examples(str(tmp_path / name))) == EXPECTED
    place(tmp_path, {"b.jsonl": '{"prompt": "p", "completion": -' + "9" * 5000 + "}"})
    assert said(read_examples(str(tmp_path / "b.jsonl"))) == [("p", "-" + "9" * 5000)]


def test_columns_that_nothing_reads_may_change_their_type_from_row_to_row(tmp_path):
    odd = [1, "one", {"a": [1]}, None, [{"x": 1}]]
    rows = [{"meta": value, **pair} for value, pair in zip(odd, PAIRS, strict=True)]
    place(tmp_path, {"a.jsonl": "".join(json.dumps(row) + "\n" for row in rows), "a.json": json.dumps(rows)})
    for name in ("a.jsonl", "a.json"):
        result = read_examples(str(tmp_path / name))
        assert said(result) == EXPECTED and result.unread == {"meta": 4}


# ---- odd rows


def test_all_odd_rows_are_told_at_once_by_kind(tmp_path):
    odd = [
        "not json",
        '{"prompt": "p"}',
        '{"prompt": "p", "completion": null}',
        '{"prompt": "p", "completion": [{"role": "narrator", "content": "x"}]}',
        "[]",
        '{"prompt": "p", "completion": {"a": 1}}',
    ]
    place(tmp_path, {"a.jsonl": "\n".join([odd[0], *LINES.splitlines(), *odd[1:], *LINES.splitlines()])})
    result = read_examples(str(tmp_path / "a.jsonl"))
    assert said(result) == EXPECTED * 2 and result.num_rows == 16
    assert {error.origin: error.finding for error in result.odd} == {
        "a.jsonl:1": "unreadable-row",
        "a.jsonl:7": "missing-column",
        "a.jsonl:8": "not-text",
        "a.jsonl:9": "odd-turn",
        "a.jsonl:10": "unreadable-row",
        "a.jsonl:11": "not-text",
    }
    with pytest.raises(DataError, match=r"a\.jsonl:1: not JSON.*and 5 more rows that cannot be read"):
        result.check_whole()


def test_tables_are_read_on_too(tmp_path):
    place(tmp_path, {"a.csv": 'prompt,completion\na,b\nc\nd,"e"f\ng,h\n1,2,3\n\ni,j\n'})
    result = read_examples(str(tmp_path / "a.csv"))
    assert said(result) == [("a", "b"), ("g", "h"), ("i", "j")]
    assert [error.origin for error in result.odd] == ["a.csv:3", "a.csv:4", "a.csv:6"]


# ---- tables of spreadsheets


@pytest.mark.parametrize("delimiter", (",", ";", "\t", "|"))
@pytest.mark.parametrize("suffix", ("csv", "tsv"))
@pytest.mark.parametrize("encoding", ("utf-8", "utf-8-sig", "utf-16", "cp1252"))
def test_delimiters_and_encodings_are_told_from_the_bytes(tmp_path, delimiter, suffix, encoding):
    heading = delimiter.join(("Prompt", " completion ", "share"))
    rows = [
        f'"Où, {n}"{delimiter}"café; {n}"{delimiter}0,{n}'.replace("0,", "0," if delimiter != "," else "0.")
        for n in (1, 2)
    ]
    place(tmp_path, {f"a.{suffix}": "\r\n".join([heading, *rows, ""]).encode(encoding)})
    result = read_examples(str(tmp_path / f"a.{suffix}"))
    assert said(result) == [("Où, 1", "café; 1"), ("Où, 2", "café; 2")] and not result.odd
    notices = " ".join(result.notices)
    assert ("separated by" in notices) == (delimiter != {"csv": ",", "tsv": "\t"}[suffix])
    assert ("read as" in notices) == (not encoding.startswith("utf-8"))


def test_decimal_commas_stay_as_they_are_written(tmp_path):
    place(tmp_path, {"a.csv": "prompt;completion\nhalf;0,5\n"})
    assert said(read_examples(str(tmp_path / "a.csv"))) == [("half", "0,5")]


def test_a_spreadsheets_own_line_about_its_delimiter(tmp_path):
    place(tmp_path, {"a.csv": "sep=;\r\nprompt;completion\r\na;b\r\n"})
    result = read_examples(str(tmp_path / "a.csv"))
    assert said(result) == [("a", "b")] and result.examples[0].origin == "a.csv:3"


def test_columns_of_ones_own_decide_too(tmp_path):
    place(tmp_path, {"a.csv": "Frage;Antwort, kurz\na;b\n"})
    result = read_examples(str(tmp_path / "a.csv"), FieldNames(prompt="Frage", completion="Antwort, kurz"))
    assert said(result) == [("a", "b")]


# ---- encodings and packings


@pytest.mark.parametrize("encoding", ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"))
@pytest.mark.parametrize("form", ("lines", "list"))
def test_encodings_of_json(tmp_path, encoding, form):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in FRENCH)
    text = lines if form == "lines" else json.dumps(FRENCH, ensure_ascii=False)
    place(tmp_path, {"a.jsonl": text.encode(encoding)})
    result = read_examples(str(tmp_path / "a.jsonl"))
    assert said(result) == [(row["prompt"], row["completion"]) for row in FRENCH]
    assert any("read as" in n and "UTF-8" in n for n in result.notices) == (encoding != "utf-8-sig")


@pytest.mark.parametrize(
    "text, encoding", [("Привет, мир", "cp1251"), ("zażółć gęślą jaźń", "cp1250"), ("你好世界", "gbk")]
)
def test_what_is_not_western_is_not_read_as_if_it_were(tmp_path, text, encoding):
    content = json.dumps({"prompt": text, "completion": text}, ensure_ascii=False).encode(encoding)
    place(tmp_path, {"a.jsonl": LINES.encode() + content})
    [error] = read_examples(str(tmp_path / "a.jsonl")).odd
    assert error.origin == "a.jsonl:6" and "is not UTF-8" in str(error)


def test_a_damaged_line_in_utf_8_does_not_make_it_another_encoding(tmp_path):
    rows = [json.dumps(row, ensure_ascii=False).encode() for row in FRENCH]
    place(tmp_path, {"a.jsonl": b"\n".join([*rows, '{"prompt": "d\xe9j\xe0", "completion": "vu"}'.encode("latin-1")])})
    result = read_examples(str(tmp_path / "a.jsonl"))
    assert len(result.examples) == 2 and [error.origin for error in result.odd] == ["a.jsonl:3"]


def zstd(content: bytes) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "suffix, pack", [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd)]
)
@pytest.mark.parametrize("named", (True, False))
def test_packed_files(tmp_path, suffix, pack, named):
    name = f"a.jsonl.{suffix}" if named else "a.jsonl"
    place(tmp_path, {name: pack(LINES.encode())})
    result = read_examples(str(tmp_path / name))
    assert said(result) == EXPECTED and result.examples[4].origin == f"{name}:5"


# ---- text


def test_a_text_file_is_rows_of_whole_lines_and_nothing_is_lost(tmp_path):
    paragraphs = [f"Paragraph {n}. " + "word " * 60 + "\n" + "more " * 60 for n in range(40)]
    text = "\n\n".join(paragraphs)
    place(tmp_path, {"book.txt": text, "long.md": "x" * 5000 + "\n" + "y" * 10})
    result = read_examples(str(tmp_path / "book.txt"))
    assert len(result.examples) > 5 and "\n\n".join(example.text for example in result.examples) == text
    lines = text.split("\n")
    for example in result.examples:
        line = int(example.origin.removeprefix("book.txt:"))
        assert example.text.startswith(lines[line - 1]) and len(example.text) < 4000
    assert "end token" in result.notices[0]
    assert [example.text for example in read_examples(str(tmp_path / "long.md")).examples] == ["x" * 5000, "y" * 10]


# ---- several files


def test_several_files_folders_and_patterns(tmp_path):
    first, second = LINES.splitlines(keepends=True)[:2], LINES.splitlines(keepends=True)[2:]
    place(tmp_path, {"a.jsonl": "".join(first), "parts/b.jsonl": second[0], "parts/deep/c.jsonl": "".join(second[1:])})
    place(tmp_path, {"parts/README.md": "about", "parts/.hidden.jsonl": "x"})
    for sources in (
        [tmp_path / "a.jsonl", tmp_path / "parts"],
        [tmp_path / "a.jsonl", tmp_path / "parts/b.jsonl", tmp_path / "parts/deep/c.jsonl"],
        [tmp_path / "*.jsonl", tmp_path / "parts/**/*.jsonl"],
    ):
        assert said(read_examples([str(source) for source in sources])) == EXPECTED
    assert "README.md" in " ".join(read_examples(str(tmp_path / "parts")).notices)


def test_each_file_has_a_format_of_its_own_and_places_tell_files_of_one_name_apart(tmp_path):
    place(tmp_path, {"x/a.jsonl": LINES, "y/a.jsonl": '{"text": "t"}\n'})
    result = read_examples([str(tmp_path / "x/a.jsonl"), str(tmp_path / "y/a.jsonl")])
    assert result.layout == "prompt/completion, text"
    assert len({example.origin for example in result.examples}) == 6


def test_a_file_is_not_read_twice(tmp_path):
    place(tmp_path, {"a.jsonl": LINES})
    with pytest.raises(DataError, match="named twice"):
        read_examples([str(tmp_path / "a.jsonl"), str(tmp_path / "*.jsonl")])


def test_a_folder_does_not_mix_held_out_rows_into_the_training(tmp_path):
    place(tmp_path, {"train-00000.jsonl": LINES, "test-00000.jsonl": LINES})
    with pytest.raises(DataError, match=r"holds test-00000\.jsonl beside others(?s:.*)train\*"):
        read_examples(str(tmp_path))
    assert said(read_examples(str(tmp_path / "train*"))) == EXPECTED


def test_a_pattern_without_files(tmp_path):
    with pytest.raises(DataError, match="no file of this pattern"):
        read_examples(str(tmp_path / "*.jsonl"))
