"""Batches against a slow, plain-Python account of what each position must predict; sampler and micro-batches."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from nybble.data.examples import EncodedExample
from nybble.data.packing import IGNORE, collate, pack, pack_tokens, pad
from nybble.data.permutation import permutation
from nybble.data.sampler import StepSampler, split_micro_batches


def encoded(ids: list[int], supervised: list[int], origin: str = "f:1") -> EncodedExample:
    return EncodedExample(torch.tensor(ids, dtype=torch.int32), torch.tensor(supervised, dtype=torch.bool), origin)


def random_documents(seed: int, count: int = 5) -> list[EncodedExample]:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 9) for _ in range(count)]
    return [
        encoded([draw.randint(1, 99) for _ in range(n)], [draw.randint(0, 1) for _ in range(n)], f"f:{row}")
        for row, n in enumerate(lengths, 1)
    ]


def expected_targets(document: EncodedExample) -> list[int]:
    ids, mask = document.input_ids.tolist(), document.supervised.tolist()
    return [ids[t + 1] if t + 1 < len(ids) and mask[t + 1] else IGNORE for t in range(len(ids))]


@pytest.mark.parametrize("seed", range(5))
def test_pack(seed):
    documents = random_documents(seed)
    batch = pack(documents)
    assert batch.input_ids.tolist() == [[token for d in documents for token in d.input_ids.tolist()]]
    assert batch.position_ids.tolist() == [[t for d in documents for t in range(len(d))]]
    assert batch.targets.tolist() == [[target for d in documents for target in expected_targets(d)]]
    borders = [sum(len(d) for d in documents[:i]) for i in range(len(documents) + 1)]
    assert batch.cu_seqlens.tolist() == borders and batch.cu_seqlens.dtype == torch.int32
    assert batch.supervised_tokens == sum(d.supervised_tokens for d in documents) == len(batch.supervised_positions)
    assert batch.rows == ("f:1", "f:2", "f:3", "f:4", "f:5") and batch.packed
    assert batch.num_tokens == borders[-1] and batch.document_lengths == tuple(map(len, documents))


@pytest.mark.parametrize("seed", range(5))
def test_pad(seed):
    documents = random_documents(seed)
    batch = pad(documents, pad_id=7)
    width = max(map(len, documents))
    for row, document in enumerate(documents):
        rest = width - len(document)
        assert batch.input_ids[row].tolist() == document.input_ids.tolist() + [7] * rest
        assert batch.position_ids[row].tolist() == [*range(len(document)), *[0] * rest]
        assert batch.attention_mask[row].tolist() == [1] * len(document) + [0] * rest
        assert batch.targets[row].tolist() == expected_targets(document) + [IGNORE] * rest
    assert batch.supervised_tokens == sum(d.supervised_tokens for d in documents) == len(batch.supervised_positions)
    assert not batch.packed and batch.num_tokens == sum(map(len, documents))


def test_nothing_crosses_documents():
    """The first token of a document is supervised: still, the document before must not predict it."""
    batch = pack([encoded([1, 2], [1, 1]), encoded([3, 4], [1, 1])])
    assert batch.targets.tolist() == [[2, IGNORE, 4, IGNORE]]


@pytest.mark.parametrize("packed", (True, False))
def test_targets_and_weights_of_the_supervised_positions(packed):
    documents = random_documents(1)
    batch = collate(documents, packed)
    assert batch.packed == packed and batch.supervised_weights is None
    expected = [target for d in documents for target in expected_targets(d) if target != IGNORE]
    assert batch.supervised_targets.tolist() == expected
    weighted = replace(batch, weights=(10 * batch.targets).float())
    assert weighted.supervised_weights.tolist() == [10.0 * target for target in expected]


def test_tokens_that_are_only_read_are_packed_without_a_target():
    batch = pack_tokens([[5, 6, 7], torch.tensor([8])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8]] and batch.position_ids.tolist() == [[0, 1, 2, 0]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4] and batch.supervised_tokens == 0


def test_to_moves_every_tensor():
    packed = pack(random_documents(0))
    moved = replace(packed, weights=packed.targets.float()).to("meta")
    tensors = (moved.input_ids, moved.position_ids, moved.targets, moved.cu_seqlens, moved.weights)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.attention_mask is None


def test_what_values_tell_is_known_before_they_move():
    packed = pack(random_documents(0))
    moved = replace(packed, weights=packed.targets.float()).to("meta")  # where nobody can look at them
    found = (moved.supervised_positions, moved.supervised_targets, moved.supervised_weights)
    assert {(tensor.device.type, tensor.shape) for tensor in found} == {("meta", (packed.supervised_tokens,))}
    assert moved.largest_target == max(packed.targets.flatten().tolist())
    other = replace(packed.to("cpu"), targets=torch.full_like(packed.targets, IGNORE), supervised_tokens=0)
    assert len(other.supervised_positions) == 0 and other.largest_target == -1


def test_tensors_go_to_a_gpu_from_pinned_memory_without_waiting(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **how: calls.append((*args, how)) or self)
    pack(random_documents(0)).to("cuda")
    moves = [("pinned"), (torch.device("cuda"), {"non_blocking": True})]
    assert calls[-12:] == moves * 6  # ids, positions, targets, borders; where targets are, and which


def test_prompt_and_answer_of_a_sequence():
    document = encoded([1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 0, 1])
    assert document.prompt_ids == [1, 2] and document.answer_ids == [3, 4] and document.supervised_tokens == 3
    assert encoded([1, 2], [0, 1]).answer_ids == [2] and encoded([1, 2], [0, 0]).answer_ids == []


def test_truncation_is_counted():
    document = encoded([1, 2, 3, 4], [0, 1, 1, 1])
    cut = document.truncate(3)
    assert (len(cut), cut.num_truncated, cut.supervised_tokens) == (3, 1, 2) and document.truncate(4) is document


def test_permutation_is_one_and_depends_on_seed_and_label():
    first = permutation(100, 0, "epoch 0")
    assert sorted(first) == list(range(100))
    others = permutation(100, 1, "epoch 0"), permutation(100, 0, "epoch 1")
    assert len({tuple(order) for order in (first, *others)}) == 3


def test_permutation_never_changes():
    """Runs are resumed across versions of nybble, Python and torch: these numbers may not change."""
    assert tuple(permutation(10, 0, "epoch 0")) == PERMUTATION_10


PERMUTATION_10 = (1, 4, 7, 9, 3, 8, 5, 0, 2, 6)


@pytest.mark.parametrize("num_rows, rows_per_step", [(10, 3), (7, 7), (3, 8), (1, 1), (16, 4)])
def test_every_row_is_seen_once_an_epoch(num_rows, rows_per_step):
    sampler = StepSampler(num_rows, rows_per_step, seed=3)
    steps = [sampler.next_step() for _ in range(num_rows)]  # rows_per_step epochs
    assert all(len(step) == rows_per_step for step in steps)
    rows = [row for step in steps for row in step]
    epochs = [rows[i : i + num_rows] for i in range(0, len(rows), num_rows)]
    assert all(sorted(epoch) == list(range(num_rows)) for epoch in epochs)
    assert (sampler.epoch, sampler.offset) == (rows_per_step, 0)


@pytest.mark.parametrize("stop", range(8))
def test_a_restored_sampler_goes_on_where_it_was(stop):
    whole, first = StepSampler(10, 4, seed=1), StepSampler(10, 4, seed=1)
    expected = [whole.next_step() for _ in range(12)]
    seen = [first.next_step() for _ in range(stop)]
    second = StepSampler(10, 4, seed=99)
    second.load_state(first.state())
    assert seen + [second.next_step() for _ in range(12 - stop)] == expected


def test_a_sampler_restored_over_more_rows_goes_on_after_as_many():
    first, second = StepSampler(10, 4, seed=1), StepSampler(13, 4, seed=1)
    for _ in range(4):
        first.next_step()
    second.load_state(first.state())
    assert (second.epoch, second.offset) == (1, 3)


def test_number_of_steps():
    assert StepSampler(100, 16, 0).num_steps(1.0) == 7
    assert StepSampler(100, 10, 0).num_steps(0.5) == 5
    assert StepSampler(2, 16, 0).num_steps(1.0) == 1


@pytest.mark.parametrize("packed", (True, False))
@pytest.mark.parametrize("count, size", [(16, 4), (10, 4), (3, 8), (5, 1)])
def test_micro_batches_hold_each_row_once(packed, count, size):
    draw = random.Random(count)
    lengths = [draw.randint(1, 500) for _ in range(40)]
    rows = draw.sample(range(40), count)
    batches = split_micro_batches(rows, lengths, size, packed)
    assert Counter(row for batch in batches for row in batch) == Counter(rows)
    assert len(batches) == -(-count // size) and max(map(len, batches)) <= size
    assert batches == split_micro_batches(rows[::-1], lengths, size, packed), "the order of rows must not matter"


def test_packed_micro_batches_are_balanced_and_padded_ones_waste_little():
    lengths = [100, 90, 80, 70, 40, 30, 20, 10]
    packed = split_micro_batches(range(8), lengths, 4)
    assert [sum(lengths[row] for row in batch) for batch in packed] == [220, 220]
    assert split_micro_batches(range(8), lengths, 4, packed=False) == [[0, 1, 2, 3], [4, 5, 6, 7]]
