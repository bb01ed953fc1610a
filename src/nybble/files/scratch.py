"""A file for what does not fit into memory: without a name, its room taken first, its reads and writes checked.

Nothing of it is left however the process ends, and a disk that is full is found out before the first step. Nothing is
mapped: a disk that fails later, or a file that someone shortens, is an exception and not a bus error.
"""

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from nybble.errors import PlanError


class ScratchFile:
    """Bytes on the disk of a folder for as long as the object lives.

    Args:
        folder: on the disk that takes the file.
        num_bytes: room that is taken at once; a write beyond it makes the file longer.
        content: what it is for, with a capital: "The optimizer's state".
        option: that the run would do without it with, for the message.

    Raises:
        PlanError: the disk has no room for it.
    """

    def __init__(self, folder: Path, num_bytes: int, content: str, option: str):
        self.num_bytes, self._content, self._folder = num_bytes, content, folder
        try:
            self._file = tempfile.TemporaryFile(dir=folder, prefix=".scratch-", buffering=0)  # noqa: SIM115  # closed with us
        except OSError as error:
            raise self._no_room(option, error) from error
        try:
            os.posix_fallocate(self._file.fileno(), 0, max(1, num_bytes))
        except OSError as error:
            self._file.close()
            raise self._no_room(option, error) from error

    def write(self, tensor: Tensor, at: int) -> None:
        """The bytes of a contiguous tensor, from byte `at` on.

        Raises:
            OSError: the disk is full or fails.
        """
        data = _bytes(tensor)
        while len(data):
            try:
                count = os.pwrite(self._file.fileno(), data, at)
            except OSError as error:
                raise self._failed(error.errno, error.strerror, at) from error
            data, at = data[count:], at + count

    def read(self, tensor: Tensor, at: int) -> None:
        """Fill a contiguous tensor with the bytes from byte `at` on.

        Raises:
            OSError: the disk fails, or the file ends too soon.
        """
        data = _bytes(tensor)
        while len(data):
            try:
                count = os.preadv(self._file.fileno(), [data], at)
            except OSError as error:
                raise self._failed(error.errno, error.strerror, at) from error
            if count == 0:
                raise self._failed(None, "the file has been shortened", at)
            data, at = data[count:], at + count

    def _failed(self, number: int | None, reason: str | None, at: int) -> OSError:
        return OSError(number, f"{self._content}, byte {at} of a file there: {reason}", str(self._folder))

    def _no_room(self, option: str, error: OSError) -> PlanError:
        return PlanError(
            f"{self._content}, {self.num_bytes / 1e9:.2f} GB, does not go into a file in {self._folder}: "
            f"{error.strerror}.",
            fix=f"Make room on that disk, choose another --out, or add {option}.",
        )


def _bytes(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.detach().view(-1).view(torch.uint8).numpy().data
    return data
