"""What the options of a machine say: where to compute, in which dtype, on how many threads."""

import re

import pytest
import torch

from nybble.errors import ConfigError
from nybble.layers.precision import resolve_compute_dtype, set_up
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


def refuse(message: str) -> None:
    raise RuntimeError(message)


@pytest.mark.parametrize(
    ("built_for", "says"),
    [
        (None, "this PyTorch is built for processors alone"),
        ("13.0", "The NVIDIA driver on your system is too old (found version 11040)"),
        ("13.0", ""),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, built_for: str | None, says: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "init", lambda: refuse(f"{says}. Please update.\nMore.") if says else None)
    assert set_up(MachineOptions())[0] == CPU
    with pytest.raises(ConfigError, match=re.escape(says or "PyTorch sees no GPU")):
        set_up(MachineOptions(device="cuda"))


def test_a_card_that_only_imitates_bf16_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """One before Ampere, of which PyTorch says that it supports bf16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert resolve_compute_dtype("auto", torch.device("cuda")) == torch.float32


@pytest.mark.parametrize(("there", "name"), [("backends.mps", "mps"), ("xpu", "xpu")])
def test_a_mac_and_an_intel_gpu_are_used_only_where_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, there: str, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(f"torch.{there}.is_available", lambda: True)
    assert set_up(MachineOptions())[0] == CPU
    with pytest.raises(ConfigError, match=f"it is used where --device {name} asks for it"):
        set_up(MachineOptions(device="cuda"))
    assert set_up(MachineOptions(device=name))[0] == torch.device(name)
