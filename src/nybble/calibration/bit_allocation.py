"""Which layer gets how many bits: the choice of least predicted loss within a budget of bytes.

Each layer takes one of a few formats, each with a size and a predicted loss; losses of layers add up. That is a
multiple-choice knapsack. It is solved exactly by dynamic programming over sizes (Bellman 1957; only the states that no
other state beats in both size and loss are kept, Nemhauser and Ullmann 1969): for every total size that layers
1..i can have, the least loss. Sizes of a model's matrices share a large common divisor, so the states stay few.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Option(NamedTuple):
    """One format of one layer."""

    format: str
    num_bytes: int
    loss: float


class _States(NamedTuple):
    """The unbeaten totals over the layers so far, by rising size and falling loss."""

    num_bytes: Tensor  # int64 (S,)
    loss: Tensor  # float64 (S,)
    previous: Tensor  # int64 (S,), the state before the last layer
    option: Tensor  # int64 (S,), what the last layer took


def choose_formats(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, str] | None:
    """Layer -> format, with the least total loss of all choices that take `budget` bytes at most; None where none does.

    Args:
        options: layer -> what it may take, at least one.
    """
    start = torch.zeros(1, dtype=torch.int64)
    states = [_States(start, torch.zeros(1, dtype=torch.float64), start, start)]
    smallest = [min(option.num_bytes for option in choices) for choices in options.values()]
    still_needed = sum(smallest)
    for choices, least in zip(options.values(), smallest, strict=True):
        still_needed -= least
        states.append(_extend(states[-1], choices, budget - still_needed))
        if not len(states[-1].loss):
            return None
    at = len(states[-1].loss) - 1  # the largest total has the least loss
    chosen = {}
    for (layer, choices), state in zip(reversed(list(options.items())), reversed(states), strict=False):
        chosen[layer] = choices[int(state.option[at])].format
        at = int(state.previous[at])
    return {layer: chosen[layer] for layer in options}


def _extend(states: _States, choices: Sequence[Option], limit: int) -> _States:
    """The unbeaten totals with one more layer, those of more than `limit` bytes left out."""
    count = len(states.loss)
    num_bytes = torch.cat([states.num_bytes + option.num_bytes for option in choices])
    loss = torch.cat([states.loss + option.loss for option in choices])
    previous = torch.arange(count).repeat(len(choices))
    option = torch.arange(len(choices)).repeat_interleave(count)

    # By size, the smaller loss first among equal sizes; then only what is better than everything smaller.
    order = loss.argsort(stable=True)
    order = order[num_bytes[order].argsort(stable=True)]
    order = order[num_bytes[order] <= limit]
    best_before = torch.cat([loss.new_tensor([torch.inf]), loss[order].cummin(0).values[:-1]])[: len(order)]
    order = order[loss[order] < best_before]
    return _States(num_bytes[order], loss[order], previous[order], option[order])
