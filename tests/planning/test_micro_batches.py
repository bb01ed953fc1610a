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
from nybble.sizes import SHAPE_RULES, rules_for

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
@pytest.mark.parametrize(("packed", "rules"), [(True, RULES), (False, RULES), (False, rules_for("cpu", 2))])
@pytest.mark.parametrize(("size", "steps"), [(1, 9), (3, 20), (8, 2)])
def test_the_largest_micro_batches_are_those_that_come(monkeypatch, counted_steps, packed, rules, size, steps):
    monkeypatch.setattr(micro_batches, "COUNTED_STEPS", counted_steps)
    train, validation = rows(50, 0), rows(7, 1)
    told = count_micro_batches(
        train, validation, rows_per_step=8, steps=steps, seed=5, size=size, packed=packed, rules=rules
    )

    sampler = StepSampler(len(train), 8, 5)
    lengths = [len(row) for row in train]
    dealt = [split_micro_batches(sampler.next_step(), lengths, size, packed) for _ in range(steps)]
    come = [micro for step in dealt for micro in step]
    batches = [(pack if packed else pad)([train[row] for row in micro]) for micro in come]

    def tokens(batch):
        count, width = batch.input_ids.shape
        total = count * (width if packed else rules.padded_width(width))
        return -(-total // RULES.token_multiple) * RULES.token_multiple if packed else total

    assert told.tokens == max(map(tokens, batches))
    assert told.supervised == max(batch.supervised_tokens for batch in batches)
    heaviest = (pack if packed else pad)([train[row] for row in told.heaviest])
    assert tokens(heaviest) == told.tokens
    assert told.token_counts <= len(set(map(tokens, batches)))
    if counted_steps > steps:
        assert told.token_counts == len(set(map(tokens, batches)))
    assert told.validation_tokens
    if not packed and counted_steps > steps:
        padded = [sum(tokens(pad([train[row] for row in micro])) for micro in step) for step in dealt]
        assert told.share * told.tokens * -(-8 // size) == pytest.approx(max(padded))
        assert (told.share < 1) == (size < 8)
    if packed:
        assert told.share == 1


def test_rows_that_are_padded_go_few_at_once_where_their_lengths_differ():
    """As many of the longest would take the longest; each few are padded to the longest of themselves."""
    train = rows(64, 2)
    uneven = {size: _counted(train, size) for size in (1, 2, 4, 8)}
    even = {size: _counted([row for row in train[:1] for _ in range(64)], size) for size in (1, 2, 4, 8)}
    work = [told.share * told.tokens * 8 // size for size, told in uneven.items()]
    assert work == sorted(work) and work[0] < 0.8 * work[-1]
    assert {told.share for told in even.values()} == {1.0}


def _counted(train, size):
    return count_micro_batches(train, train[:4], rows_per_step=8, steps=8, seed=1, size=size, packed=False, rules=RULES)


def test_padded_rows_come_in_few_widths_where_each_costs_compiled_products():
    rules = rules_for("cpu", 2)
    widths = [rules.padded_width(longest) for longest in range(1, 513)]
    assert all(longest <= width < 1.5 * max(longest, 6) for longest, width in enumerate(widths, start=1))
    assert len(set(widths)) == 13 and rules.padded_width(513) == 768
    assert RULES.padded_width(77) == rules_for("cuda", 2).padded_width(77) == rules_for("cpu", 4).padded_width(77) == 77


def test_rows_of_one_length_need_no_data():
    told = even_micro_batches(100, rows_per_step=8, size=3, packed=True, rules=RULES)
    assert (told.tokens, told.supervised, told.token_counts) == (320, 300, 2)
    assert even_micro_batches(100, rows_per_step=8, size=4, packed=False, rules=RULES).tokens == 400


def test_a_plan_and_a_run_count_the_same_steps():
    assert total_steps(LengthOptions(epochs=2.5), 10, 4) == 7
    assert total_steps(LengthOptions(epochs=2.5, max_steps=3), 10, 4) == 3
