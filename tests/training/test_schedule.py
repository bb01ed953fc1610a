import itertools
import math

import pytest

from nybble.training.schedule import learning_rate, warmup_steps


def test_warmup_is_a_fraction_below_one_and_steps_from_one():
    assert warmup_steps(0.03, 200) == 6
    assert warmup_steps(0.03, 10) == 1
    assert warmup_steps(0.0, 10) == 0
    assert warmup_steps(5, 200) == 5
    assert warmup_steps(500, 200) == 200


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("num_warmup", [0, 1, 10])
def test_rises_to_the_peak_then_never_rises_and_every_step_moves(schedule, num_warmup):
    rates = [learning_rate(step, 50, num_warmup, schedule, 1e-3) for step in range(1, 51)]
    assert all(rate > 0 for rate in rates)
    assert max(rates) == rates[num_warmup - 1 if num_warmup else 0] == 1e-3
    after = rates[num_warmup:]
    assert all(earlier >= later for earlier, later in itertools.pairwise(after))
    assert rates[:num_warmup] == pytest.approx([1e-3 * step / num_warmup for step in range(1, num_warmup + 1)])


def test_values_of_each_schedule():
    assert learning_rate(26, 50, 0, "cosine", 1.0) == pytest.approx(0.5)
    assert learning_rate(26, 50, 0, "linear", 1.0) == pytest.approx(0.5)
    assert learning_rate(50, 50, 0, "cosine", 1.0) == pytest.approx(0.5 * (1 + math.cos(math.pi * 49 / 50)))
    assert learning_rate(50, 50, 0, "constant", 1.0) == 1.0
