"""What a run will meet, told before it starts, against what its sampler then deals."""

import random

import pytest
import torch

from nybble.data.examples import EncodedExample
from nybble.data.packing import pack, pad
from nybble.data.sampler import StepSampler, split_micro_batches
from nybble.options.groups import LengthOptions
from nybble.planning import micro_batches
from nybble.planning.micro_batches import count_micro_batches, even_micro_batches, total_steps
from nybble.sizes import SHAPE_RULES

RULES = SHAPE_RULES["cpu"]


def rows(count, seed):
    draw = random.Random(seed)
    found = []
    for i in range(count):
        length = draw.randint(2, 300)
        supervised = draw.randint(1, length - 1)
        ids = torch.arange(length, dtype=torch.int32)
        found.append(EncodedExample(ids, ids >= length - supervised, f"rows:{i}"))
    return found


@pytest.mark.parametrize("counted_steps", [500, 3])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("size", "steps"), [(1, 9), (3, 20), (8, 2)])
def test_the_largest_micro_batches_are_those_that_come(monkeypatch, counted_steps, packed, size, steps):
    monkeypatch.setattr(micro_batches, "COUNTED_STEPS", counted_steps)
    train, validation = rows(50, 0), rows(7, 1)
    told = count_micro_batches(
        train, validation, rows_per_step=8, steps=steps, seed=5, size=size, packed=packed, rules=RULES
    )

    sampler = StepSampler(len(train), 8, 5)
    lengths = [len(row) for row in train]
    come = [m for _ in range(steps) for m in split_micro_batches(sampler.next_step(), lengths, size, packed)]
    batches = [(pack if packed else pad)([train[row] for row in micro]) for micro in come]

    def tokens(batch):
        total = batch.input_ids.numel()
        return -(-total // RULES.token_multiple) * RULES.token_multiple if packed else total

    assert told.tokens == max(map(tokens, batches))
    assert told.supervised == max(batch.supervised_tokens for batch in batches)
    heaviest = (pack if packed else pad)([train[row] for row in told.heaviest])
    assert tokens(heaviest) == told.tokens
    assert told.token_counts <= len(set(map(tokens, batches)))
    if counted_steps > steps:
        assert told.token_counts == len(set(map(tokens, batches)))
    assert told.validation_tokens


def test_rows_of_one_length_need_no_data():
    told = even_micro_batches(100, rows_per_step=8, size=3, packed=True, rules=RULES)
    assert (told.tokens, told.supervised, told.token_counts) == (320, 300, 2)
    assert even_micro_batches(100, rows_per_step=8, size=4, packed=False, rules=RULES).tokens == 400


def test_a_plan_and_a_run_count_the_same_steps():
    assert total_steps(LengthOptions(epochs=2.5), 10, 4) == 7
    assert total_steps(LengthOptions(epochs=2.5, max_steps=3), 10, 4) == 3
