"""Every random generator that a step may draw from: torch's on the CPU and the device, Python's and numpy's."""

import random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nybble.memory.allocators import allocator
from nybble.memory.measure import has_own_memory


class RngState(NamedTuple):
    """Where the generators stand.

    Args:
        tensors: torch's generators by device, uint8.
        numbers: Python's and numpy's, ready for JSON.
    """

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


def capture_rng(device: torch.device) -> RngState:
    """The state of all generators now; drawing nothing."""
    tensors = {"cpu": torch.get_rng_state()}
    if has_own_memory(device):  # a GPU has a generator of its own
        tensors[device.type] = allocator(device).get_rng_state(device)
    legacy: Any = np.random.get_state()
    return RngState(tensors, {"python": random.getstate(), "numpy": [legacy[1].tolist(), *legacy[2:]]})


def restore_rng(state: RngState, device: torch.device) -> None:
    """Put all generators where `capture_rng` found them."""
    torch.set_rng_state(state.tensors["cpu"])
    if has_own_memory(device) and (own := state.tensors.get(device.type)) is not None:
        allocator(device).set_rng_state(own, device)
    version, internal, gauss = state.numbers["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, *position = state.numbers["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *position))
