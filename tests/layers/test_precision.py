"""What the options of a machine say: where to compute, in which dtype, on how many threads."""

import pytest
import torch

from nybble.errors import ConfigError
from nybble.layers.precision import set_up
from nybble.options.groups import ComputeOptions, MachineOptions

CPU = torch.device("cpu")


def test_device_and_dtype_are_found_and_threads_are_set() -> None:
    threads = torch.get_num_threads()
    assert set_up(MachineOptions(device="cpu", compute_dtype="fp32")) == (CPU, torch.float32)
    assert torch.get_num_threads() == threads
    try:
        assert set_up(ComputeOptions(compute_dtype="bf16", threads=threads + 1)) == (CPU, torch.bfloat16)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert set_up(MachineOptions())[0] == CPU
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        set_up(MachineOptions(device="cuda"))
