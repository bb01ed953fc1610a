"""Rows are encoded once: what was encoded when a run was stopped is not encoded again, and comes out the same."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import zlib
from functools import partial
from pathlib import Path

import pytest

from nybble.data import row_encoding
from nybble.data.examples import EncodedExample, Example
from nybble.data.prepare import EXAMPLE_ROWS, PreparedData, prepare
from nybble.data.row_kinds import ROW_KINDS
from nybble.data.row_records import RECORDS, ROWS_AT_ONCE
from nybble.data.supervision import Learnt
from nybble.data.template import ChatTemplate
from nybble.errors import RunError
from nybble.events import Note

COUNT = 2 * ROWS_AT_ONCE + 20


@pytest.fixture(autouse=True)
def _few_rows_are_many(monkeypatch) -> None:
    monkeypatch.setattr(row_encoding, "MANY", 10)


@pytest.fixture
def template(tokenizer_of) -> ChatTemplate:
    return ChatTemplate(tokenizer_of("bytes", "chatml"))


def write(path: Path, changed: int | None = None) -> str:
    """Rows of several lengths: some too long, one refused, one that loses its whole answer."""
    rows = [{"prompt": f"q{n}", "completion": "word " * (n % 9)} for n in range(1, COUNT + 1)]
    rows[7] = {"prompt": "p" * 300, "completion": "beyond"}
    if changed is not None:
        rows[changed]["completion"] = "another"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def told(data: PreparedData) -> tuple:
    """Everything that comes of rows, to the byte."""
    parts = [[(pickle.dumps(row), *row.document_lengths) for row in part] for part in (data.train, data.validation)]
    return *parts, data.audit.to_json()


def counting(monkeypatch) -> list[str]:
    """Origins of rows as they are encoded."""
    seen: list[str] = []
    once = row_encoding.RowEncoder.__call__

    def encode(encoder: row_encoding.RowEncoder, example: Example) -> row_encoding.Encoded:
        seen.append(example.origin)
        return once(encoder, example)

    monkeypatch.setattr(row_encoding.RowEncoder, "__call__", encode)
    return seen


def killed_at(row: int, source: str, template: ChatTemplate, folder: Path) -> None:
    def encode(template: ChatTemplate, example: Example) -> list[EncodedExample]:
        if example.origin.endswith(f":{row}"):
            os.kill(os.getpid(), signal.SIGKILL)
        return template.encode_example(example)

    encode.__module__, encode.__qualname__ = ChatTemplate.__module__, EXAMPLE_ROWS.encode.__qualname__
    kind = type(EXAMPLE_ROWS)(EXAMPLE_ROWS.forms, encode)
    prepare(source, template, max_seq_len=60, kind=kind, encoded=folder)


def test_encoding_that_is_killed_goes_on_where_it_was(tmp_path, template, monkeypatch):
    source, folder = write(tmp_path / "a.jsonl"), tmp_path / "rows"
    alone = told(prepare(source, template, max_seq_len=60))
    fork = multiprocessing.get_context("fork").Process(
        target=killed_at, args=(ROWS_AT_ONCE + 30, source, template, folder)
    )
    fork.start()
    fork.join()
    assert fork.exitcode == -signal.SIGKILL
    seen, notes = counting(monkeypatch), list[Note]()
    begin = partial(prepare, source, template, max_seq_len=60, encoded=folder)
    assert told(begin(report=lambda e: notes.append(e) if isinstance(e, Note) else None)) == alone
    assert len(seen) == COUNT - ROWS_AT_ONCE, "the sixty-four that it was within are encoded again"
    assert f"{ROWS_AT_ONCE + 29} of {COUNT} rows were encoded before" in notes[0].sentence
    seen.clear()
    assert told(begin()) == alone and not seen

    content = (folder / RECORDS).read_bytes()
    for cut in (content[:-3], content[:-40] + bytes(40), content[:9], b""):
        (folder / RECORDS).write_bytes(cut)
        assert told(begin()) == alone and (folder / RECORDS).read_bytes() == content


def test_rows_that_were_changed_are_encoded_anew(tmp_path, template, monkeypatch):
    folder, notes = tmp_path / "rows", list[Note]()
    listen = lambda event: notes.append(event) if isinstance(event, Note) else None  # noqa: E731
    prepare(write(tmp_path / "a.jsonl"), template, max_seq_len=60, encoded=folder, report=listen)
    assert not notes
    source = write(tmp_path / "a.jsonl", changed=3)
    seen = counting(monkeypatch)
    again = prepare(source, template, max_seq_len=60, encoded=folder, report=listen)
    assert len(seen) == ROWS_AT_ONCE and "a.jsonl:4" in seen
    assert f"{COUNT - 1} of {COUNT} rows were encoded before; the others are new, or were changed" in notes[0].sentence
    assert told(again) == told(prepare(source, template, max_seq_len=60))


@pytest.mark.parametrize("what", ["--max-seq-len", "what is learnt of them", "the chat template", "the tokenizer"])
def test_what_else_decides_is_named(what, tmp_path, tokenizer_of, template):
    source, folder, notes = write(tmp_path / "a.jsonl"), tmp_path / "rows", list[Note]()
    prepare(source, template, max_seq_len=60, encoded=folder)
    tokenizer = tokenizer_of("bytes", "chatml")
    own = str(template.chat_template)
    length = 60
    if what == "--max-seq-len":
        length = 50
    elif what == "what is learnt of them":
        template = ChatTemplate(tokenizer, learnt=Learnt("all"))
    elif what == "the chat template":
        template = ChatTemplate(tokenizer, chat_template=own.replace("user", "asker") + "{# another #}")
    else:
        tokenizer.add_tokens(["word"])
        template = ChatTemplate(tokenizer)
    again = prepare(source, template, max_seq_len=length, encoded=folder, report=notes.append)
    named = [note.sentence for note in notes if isinstance(note, Note)]
    assert named == [f"rows are encoded anew: since they were, others are: {what}"]
    assert told(again) == told(prepare(source, template, max_seq_len=length))


def test_rows_of_other_objectives_come_back_as_they_were(tmp_path, template):
    rows = {
        "dpo": [{"prompt": f"q{n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(20)],
        "kto": [{"prompt": f"q{n}", "completion": f"a {n}", "label": n % 2 == 0} for n in range(20)],
        "classify": [{"text": f"a text {n}", "label": f"l{n % 2}"} for n in range(20)],
        "embed": [{"anchor": f"a {n}", "positive": f"b {n}"} for n in range(20)],
        "reward": [{"prompt": f"q{n}", "chosen": f"yes {n}", "rejected": f"no {n}", "margin": 0.5} for n in range(20)],
    }
    for name, own in rows.items():
        source, folder, kind = tmp_path / f"{name}.jsonl", tmp_path / name, ROW_KINDS[name]
        source.write_text("".join(json.dumps(row) + "\n" for row in own))
        begin = partial(prepare, str(source), template, max_seq_len=60, kind=kind)
        alone = told(begin())
        assert told(begin(encoded=folder)) == alone == told(begin(encoded=folder)), name


def test_a_folder_that_holds_something_else_makes_nothing():
    """What a pickle names is made by unpickling it: nothing but rows is."""
    with pytest.raises(RunError, match=r"hold shutil\.rmtree"):
        row_encoding._decoded(zlib.compress(pickle.dumps(shutil.rmtree)))
