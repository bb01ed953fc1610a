"""Rows on the disk: what comes back is what was encoded, and memory does not grow with the file."""

import json
import pickle
from dataclasses import replace

import numpy as np
import torch

from nybble.data.encoded_rows import SequenceFile, TokenIds, lengths_of, supervised_of
from nybble.data.examples import EncodedExample
from nybble.data.prepare import EXAMPLE_ROWS, prepare
from nybble.data.template import ChatTemplate
from nybble.files import spool
from nybble.files.spool import Spool
from nybble.memory.measure import PeakMemory


def row(number: int) -> EncodedExample:
    ids = torch.arange(number + 2, dtype=torch.int32) * 7
    return EncodedExample(ids, ids % 3 == 0, f"f:{number}", number % 4)


def same(a: EncodedExample, b: EncodedExample) -> bool:
    tensors = torch.equal(a.input_ids, b.input_ids) and torch.equal(a.supervised, b.supervised)
    return tensors and (a.origin, a.num_truncated) == (b.origin, b.num_truncated)


def test_a_sequence_comes_back_as_it_was():
    back = pickle.loads(pickle.dumps(row(9)))
    assert same(back, row(9)) and back.input_ids.dtype == torch.int32 and back.supervised.dtype == torch.bool
    assert same(back.truncate(4), row(9).truncate(4))


def test_counts_are_those_of_the_rows():
    file = SequenceFile(Spool())
    file.extend(map(row, range(30)))
    train, validation = file.rows(np.array([4, 2, 29])), file.rows(np.array([1]))
    for chosen in (train, train + validation):
        assert lengths_of(chosen).tolist() == [len(each) for each in chosen] == lengths_of(list(chosen)).tolist()
        assert supervised_of(chosen).tolist() == supervised_of(list(chosen)).tolist()
        assert chosen.num_truncated.tolist() == [each.num_truncated for each in chosen]
    assert all(same(got, row(number)) for got, number in zip(train + validation, (4, 2, 29, 1), strict=True))
    assert [len(ids) for ids in TokenIds(train)] == [6, 4, 31]


def test_memory_does_not_grow_with_the_file(tmp_path, tokenizer_of, monkeypatch):
    """8 MB of text and 22 MB of tokens and marks; of each row some tens of bytes stay."""

    def encode(template: ChatTemplate, example) -> list[EncodedExample]:
        ids = torch.frombuffer(bytearray(example.completion[:3000], "ascii"), dtype=torch.uint8).int()
        return [EncodedExample(ids, ids > 0, example.origin)]

    def write(name: str, count: int) -> str:
        with (tmp_path / name).open("w") as file:
            for number in range(count):
                file.write(
                    json.dumps({"prompt": f"question {number}", "completion": f"{number} " + "word " * 1000}) + "\n"
                )
        return str(tmp_path / name)

    kind = replace(EXAMPLE_ROWS, encode=encode)
    monkeypatch.setattr(spool, "KEPT_BYTES", 1 << 20)
    template = ChatTemplate(tokenizer_of("bytes", "chatml"))
    prepare(write("small.jsonl", 20), template, max_seq_len=4000, kind=kind, validation_fraction=0)  # imports
    large = write("large.jsonl", 1500)
    with PeakMemory(torch.device("cpu")) as memory:
        data = prepare(large, template, max_seq_len=4000, kind=kind, validation_fraction=0)
    assert data.audit.num_train == len(data.train) == 1500
    assert data.audit.tokens == int(data.train.lengths.sum()) == 1500 * 3000
    assert memory.peak_bytes - memory.start_bytes < 10_000_000
