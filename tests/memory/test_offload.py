"""Tensors that go to a file come back the same, in any order; a full disk says so."""

import errno
import os

import pytest
import torch

from nybble.errors import PlanError
from nybble.memory.offload import ActivationFile


def test_tensors_come_back(tmp_path):
    file = ActivationFile(tmp_path, 10)
    tensors = [torch.randn(3, 5), torch.randn(4, 1).bfloat16(), torch.arange(7), torch.randn(6, 4).T, torch.empty(0)]
    for _ in range(2):
        file.begin()
        places = [file.put(tensor) for tensor in tensors]
        for tensor, place in reversed(list(zip(tensors, places, strict=True))):
            back = file.get(place)
            assert back.dtype == tensor.dtype and torch.equal(back, tensor)
    assert not any(tmp_path.iterdir())


def test_a_full_disk_says_what_to_do(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = ActivationFile(tmp_path, 10)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(PlanError, match="--offload-activations never"):
        file.put(torch.ones(3))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(PlanError, match=r"5\.00 GB.*No space left"):
        ActivationFile(tmp_path, 5_000_000_000)
