"""The choice of formats against trying every one."""

import itertools
import random

import pytest

from nybble.calibration.bit_allocation import Option, choose_formats


def total(options: dict[str, list[Option]], chosen: dict[str, str]) -> tuple[int, float]:
    taken = [next(o for o in options[layer] if o.format == chosen[layer]) for layer in options]
    return sum(o.num_bytes for o in taken), sum(o.loss for o in taken)


def brute_force(options: dict[str, list[Option]], budget: int) -> float | None:
    losses = [
        sum(option.loss for option in choice)
        for choice in itertools.product(*options.values())
        if sum(option.num_bytes for option in choice) <= budget
    ]
    return min(losses, default=None)


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_within_the_budget_is_better(seed: int) -> None:
    """Sizes with and without common divisors; losses that do not always fall with size."""
    draw = random.Random(seed)
    options = {}
    for layer in range(draw.randint(1, 7)):
        unit = draw.choice([1, 64, draw.randint(1, 99)])
        options[f"layer {layer}"] = [
            Option(format, unit * bits, draw.choice([0.0, draw.random(), draw.random() * 4**-bits]))
            for format, bits in (("four", 4), ("three", 3), ("two", 2))
        ]
    largest = sum(max(o.num_bytes for o in choices) for choices in options.values())
    for budget in {0, largest, *(draw.randint(0, largest) for _ in range(6))}:
        chosen, best = choose_formats(options, budget), brute_force(options, budget)
        if best is None:
            assert chosen is None
            continue
        assert chosen is not None and list(chosen) == list(options)
        num_bytes, loss = total(options, chosen)
        assert num_bytes <= budget and loss == pytest.approx(best, abs=1e-12)


def test_many_layers_of_the_shapes_of_a_model_take_little_time() -> None:
    draw = random.Random(0)
    sizes = (331776, 110592, 110592, 331776, 884736, 884736, 884736)
    options = {
        f"{block}.{i}": [
            Option(f, n * b // 8, draw.random() * 4.0**-b) for f, b in (("nf4", 4), ("nf3", 3), ("nf2", 2))
        ]
        for block in range(32)
        for i, n in enumerate(sizes)
    }
    budget = sum(32 * n for n in sizes) * 3 // 8
    chosen = choose_formats(options, budget)
    assert chosen is not None
    used, loss = total(options, chosen)
    uniform = sum(next(o.loss for o in choices if o.format == "nf3") for choices in options.values())
    assert used <= budget and loss < uniform
    # A swap of a layer up and another down, within the budget, must not help.
    for up, down in itertools.permutations(list(options)[:40], 2):
        better = dict(chosen)
        better[up] = "nf4"
        better[down] = "nf2"
        swapped, swapped_loss = total(options, better)
        assert swapped > budget or swapped_loss >= loss - 1e-12
