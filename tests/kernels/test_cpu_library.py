"""Loading the C++ kernels: one OpenMP pool, the choice of instruction set, and what is said without them."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nybble.errors import KernelError
from nybble.kernels.backends.cpp import attention, decode, four_bit, library, loss

needs_library = pytest.mark.skipif(library.why_unavailable() is not None, reason=str(library.why_unavailable()))


def run(code, **environment):
    """Python code in a fresh process: its output, or its last line of error."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip()


@needs_library
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp_pool_is_shared_with_torch():
    code = """
import torch
from nybble.formats.quant_spec import QuantSpec
from nybble.kernels.backends.cpp import library
from nybble.kernels.ops.four_bit import quantize
for threads in (1, 3, 2):
    torch.set_num_threads(threads)
    assert library.num_threads() == threads, (library.num_threads(), threads)
quantize(torch.randn(512, 512) @ torch.randn(512, 512), QuantSpec())
pools = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "libomp" in line or "iomp" in line}
print(len(pools))
"""
    assert run(code) == "1"


@needs_library
def test_threads_follow_torch():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert library.num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


HUGE = 1 << 45  # elements: more than any address space has


def gemv_of_huge_rows(_):
    four_bit._gemv(None, 0, 1, HUGE, 1, *[None] * 8, 1.0, 64, None)


def decode_of_a_huge_model(_):
    head = decode._Head(projection=decode._Projection(in_features=HUGE))
    step = decode._Step(rows=1, capacity=1)
    decode._decode(None, 0, ctypes.addressof(head), ctypes.addressof(step))


def attention_of_many_heads(kernel):
    bounds = torch.tensor([0, 1], dtype=torch.int32)
    arguments = attention._Arguments(
        num_docs=1, cu_seqlens=bounds.data_ptr(), num_tokens=1, num_heads=HUGE, num_kv_heads=HUGE, head_dim=16
    )
    getattr(attention, kernel)(ctypes.byref(arguments))


@needs_library
@pytest.mark.parametrize(
    ("call", "kernel"),
    [
        (lambda _: loss._cross_entropy(None, HUGE, 0, None, 1, HUGE, 1.0, None), "cross_entropy"),
        (gemv_of_huge_rows, "gemv"),
        (decode_of_a_huge_model, "decode"),
        (attention_of_many_heads, "attention_forward"),
        (attention_of_many_heads, "attention_backward"),
    ],
)
@pytest.mark.parametrize("isa", library.supported_isas() if library.why_unavailable() is None else ())
def test_a_kernel_without_memory_raises_and_the_next_call_is_fine(call, kernel, isa):
    if kernel == "gemv" and isa in ("portable", "avx2"):
        pytest.skip("this body needs no scratch memory")
    with library.use_isa(isa):
        with pytest.raises(MemoryError, match=kernel):
            call(f"_{kernel.removeprefix('attention_')}_kernel")
        logits = torch.zeros(1, 3)
        assert torch.isfinite(loss.cross_entropy_(logits, torch.tensor([1]), torch.tensor(1.0))).all()


@needs_library
def test_an_instruction_set_can_be_asked_for(monkeypatch):
    best = library.current_isa()
    assert best == library.supported_isas()[-1]
    with library.use_isa(best):  # put back afterwards
        for isa in library.supported_isas():
            monkeypatch.setenv("NYBBLE_CPU_ISA", isa)
            library.load.__wrapped__()
            assert library.current_isa() == isa
    assert library.current_isa() == best


@needs_library
def test_a_request_that_cannot_be_met_is_refused_and_not_replaced(monkeypatch):
    with pytest.raises(KernelError, match="This CPU runs the kernels for portable"), library.use_isa("sse9"):
        pass
    monkeypatch.setattr(library, "load", library.load.__wrapped__)  # as in a process that has not loaded it yet
    monkeypatch.setenv("NYBBLE_CPU_ISA", "sse9")
    with pytest.raises(KernelError, match="'sse9' was asked for"):
        library.why_unavailable()
    monkeypatch.setenv("NYBBLE_CPU_LIBRARY", "/no/such.so")
    with pytest.raises(KernelError, match=r"/no/such.so does not exist"):
        library.why_unavailable()
    monkeypatch.setenv("NYBBLE_CPU_LIBRARY", __file__)
    with pytest.raises(KernelError, match="cannot be loaded"):
        library.why_unavailable()


def test_without_the_library_the_reference_runs_and_the_reason_is_told():
    code = """
import pathlib, torch
from nybble.kernels import registry
from nybble.kernels.backends.cpp import library
from nybble.kernels.ops.four_bit import quantize
library.library_path = lambda: pathlib.Path("/no/library")
from nybble.formats.quant_spec import QuantSpec
print(quantize(torch.ones(4), QuantSpec()).packed.tolist(), library.describe()["reason"])
print({row.reason for row in registry.available() if row.backend == "cpp"})
"""
    reason = "not built (no compiler at install)"
    assert run(code).splitlines() == [f"[255, 255] {reason}", f"{{'{reason}'}}"]


@needs_library
def test_describe_says_what_doctor_shows():
    about = library.describe()
    assert about["available"] is True
    assert about["isa"] in about["isas"]
    assert about["threads"] == torch.get_num_threads()
    assert Path(about["path"]).is_file()
    assert about["compiler"]
