"""What blocks keep for their backward pass, in a file: written as each block ends, read back in reverse.

PyTorch hands a file every tensor that a block saves, and asks for it in backward (`saved_tensors_hooks`). The file has
no name; its pages lie in the system's cache as long as there is room, and on the disk where there is not.
"""

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from nybble.errors import PlanError

Place = tuple[int, torch.Size, torch.dtype]


class ActivationFile:
    """Takes tensors one after another and gives them back.

    Args:
        folder: on the disk that takes the file.
        num_bytes: of the largest micro-batch; taken now, so that a full disk is found out before the first step.

    Raises:
        PlanError: the disk has no room for it.
    """

    def __init__(self, folder: Path, num_bytes: int):
        self._end = 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder, prefix=".kept-", buffering=0)  # noqa: SIM115  # closed with us
            os.posix_fallocate(self._file.fileno(), 0, max(1, num_bytes))
        except OSError as error:
            raise _no_room(num_bytes, error) from error

    def begin(self) -> None:
        """A new micro-batch: what the last one left is overwritten."""
        self._end = 0

    def put(self, tensor: Tensor) -> Place:
        """Write a tensor at the end of the file.

        Raises:
            PlanError: the disk is full or fails.
        """
        place = (self._end, tensor.shape, tensor.dtype)
        data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
        at = self._end
        while len(data):
            try:
                count = os.pwrite(self._file.fileno(), data, at)
            except OSError as error:
                raise _no_room(at, error) from error
            data, at = data[count:], at + count
        self._end = at
        return place

    def get(self, place: Place) -> Tensor:
        """The tensor that `put` wrote there.

        Raises:
            OSError: the disk fails, or the file ends too soon.
        """
        at, shape, dtype = place
        tensor = torch.empty(shape, dtype=dtype)
        data = tensor.view(-1).view(torch.uint8).numpy().data
        while len(data):
            count = os.preadv(self._file.fileno(), [data], at)
            if count == 0:
                raise OSError(f"the file of what blocks keep ends at byte {at}")
            data, at = data[count:], at + count
        return tensor


def _no_room(num_bytes: int, error: OSError) -> PlanError:
    return PlanError(
        f"What blocks keep, {num_bytes / 1e9:.2f} GB, cannot be written to the run folder's disk: {error.strerror}.",
        fix="Make room on that disk, choose another --out, or add --offload-activations never.",
    )
