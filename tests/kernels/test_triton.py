"""Where Triton's backend runs, and what it takes."""

import importlib.util

import pytest
import torch

from nybble.kernels.backends import triton
from nybble.kernels.backends.triton.launch import too_many


def test_it_says_why_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton.why_unavailable() == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert triton.why_unavailable() == "the card has compute capability 7.5, 8.0 is the least"
    for capability in ((8, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert triton.why_unavailable() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton.why_unavailable() == "triton is not installed"


def test_offsets_have_32_bits() -> None:
    assert too_many(128256 * 16384 - 1) is None and "takes at most" in str(too_many(2**31 - 1))
