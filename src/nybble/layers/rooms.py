"""Memory that is written time and again, kept from one use to the next: a fresh piece costs its pages anew, and between
tensors that stay it leaves holes in the C library's heap.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nybble.kernels.slabs import empty


class Rooms:
    """Rooms by a key of their owner's.

    Attributes:
        kept: those that there are now, one-dimensional; a larger use may bring another in the place of one.
    """

    def __init__(self) -> None:
        self.kept: dict[object, Tensor] = {}

    def of(self, key: object, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of that shape, its values undefined, valid until the key is asked for again."""
        elements, room = math.prod(shape), self.kept.get(key)
        if room is None or room.dtype != dtype or len(room) < elements:
            del room
            self.kept.pop(key, None)  # the old room is free before the new one is taken
            with torch.inference_mode(False):  # else it could be written to in no other mode
                room = self.kept[key] = empty((elements,), dtype, device)
        return room[:elements].view(tuple(shape))
