"""This machine as a plan sees it, measured in a moment."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from nybble.cards import OTHER_ATTENTION
from nybble.kernels.hardware import cpu_flags
from nybble.kernels.heap import trim_heap
from nybble.memory.allocators import allocator
from nybble.memory.measure import anonymous_bytes, available_bytes, has_own_memory
from nybble.planning.machine_table import CUDA_CONTEXT_BYTES, Machine
from nybble.sizes import TILE_PRODUCT_BYTES

SAFE_SHARE = 0.8  # of the free memory that a run without a budget may take
IMPORTED_BYTES = 300_000_000  # Python, PyTorch and transformers as a training run imports them, measured
PROBE_S = 0.1
_ON_GPU = (4096, 8192)
# rows, and width of a square; long after it was called
PROBE_PRODUCT = {"cpu": (512, 1536), "cuda": _ON_GPU, "xpu": _ON_GPU, "mps": (2048, 4096)}
PROBE_COPY_BYTES = {"cpu": 2**24, "cuda": 2**30, "xpu": 2**28, "mps": 2**28}  # more than caches hold
LINK_COPY_BYTES = 2**26
PIECE_BYTES, PIECES = 4_194_304, 16


def this_machine(
    device: torch.device,
    dtype: torch.dtype,
    memory: int | None = None,
    host_memory: int | None = None,
    model_files: tuple[Path, ...] = (),
) -> Machine:
    """This machine: its free memory, the speed of a product, of a copy and of reading the model's files.

    Args:
        dtype: that products run in.
        memory: the user's budget; SAFE_SHARE of what is free where there is none. Never more than what is free.
        model_files: sampled for the disk's speed, in the state they are in: cached files are as fast as memory.
    """
    trim_heap()
    on_gpu = has_own_memory(device)
    process, others = context_bytes(device) if on_gpu else (anonymous_bytes(), 0)
    free = available_bytes(device)
    total = free + process
    budget = min(memory, total) if memory else process + int(SAFE_SHARE * free)
    host = host_memory or (available_bytes(torch.device("cpu")) if on_gpu else max(0, total - budget))
    flops, copy = _speeds(device, dtype, torch.get_num_threads())
    link = _link_speed(device) if on_gpu else copy
    disk = _read_speed(model_files) if model_files else copy
    name = f"this machine's {device.type}"
    machine = Machine(name, device.type, budget, process, host, flops, copy, link, disk, others_bytes=others)
    if not on_gpu:
        return replace(machine, product_bytes=TILE_PRODUCT_BYTES) if "amx_bf16" in cpu_flags() else machine
    allocator(device).empty_cache()  # what the probes were computed in
    return replace(machine, attention=OTHER_ATTENTION)  # not measured: the slowest of those known


def context_bytes(device: torch.device) -> tuple[int, int]:
    """What this process takes of a GPU beside its tensors, its libraries included, and what others take: all that is
    taken is its own. Where that is more than twice what is usual, others are there too, and its own is what is usual.
    """
    torch.ones(64, 64, device=device).mm(torch.ones(64, 64, device=device))  # makes the context, loads the library
    free, total = allocator(device).mem_get_info(device)
    taken = max(0, total - free - allocator(device).memory_reserved(device))
    own = taken if taken <= 2 * CUDA_CONTEXT_BYTES else CUDA_CONTEXT_BYTES
    return own, taken - own


def this_machine_later(
    device: torch.device, dtype: torch.dtype, memory: int | None = None, host_memory: int | None = None
) -> Machine:
    """This machine as a run of another day finds it: a CPU's budget need not be free now, and more will be imported."""
    machine = this_machine(device, dtype, memory, host_memory)
    if not machine.on_cpu:
        return machine
    process = max(IMPORTED_BYTES, machine.process_bytes)
    return replace(machine, process_bytes=process, budget_bytes=memory or machine.budget_bytes)


@cache
def _speeds(device: torch.device, dtype: torch.dtype, threads: int) -> tuple[float, float]:
    """Of a product and of a copy with so many threads: measured once in a process."""
    return _product_speed(device, dtype), _copy_speed(device)


def _product_speed(device: torch.device, dtype: torch.dtype) -> float:
    rows, width = PROBE_PRODUCT[device.type]
    a = torch.ones(rows, width, device=device, dtype=dtype)
    b = torch.ones(width, width, device=device, dtype=dtype)
    out = a @ b.T
    return 2.0 * rows * width**2 / _seconds(lambda: torch.mm(a, b.T, out=out), device)


def _copy_speed(device: torch.device) -> float:
    """Bytes a second, each counted once, of a copy that takes no more than half of the free memory."""
    size = min(PROBE_COPY_BYTES[device.type], available_bytes(device) // 4)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return size / _seconds(lambda: target.copy_(source), device)


@cache
def _link_speed(device: torch.device) -> float:
    """Bytes a second from memory of the host, pinned where it is for lanes, to a GPU."""
    source = torch.ones(LINK_COPY_BYTES, dtype=torch.uint8)
    source = source.pin_memory() if device.type == "cuda" else source
    target = torch.empty(LINK_COPY_BYTES, dtype=torch.uint8, device=device)
    return LINK_COPY_BYTES / _seconds(lambda: target.copy_(source, non_blocking=True), device)


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """The quickest of the calls that fit into PROBE_S."""
    quickest, end = float("inf"), time.perf_counter() + PROBE_S
    while time.perf_counter() < end or quickest == float("inf"):
        started = time.perf_counter()
        action()
        if has_own_memory(device):
            allocator(device).synchronize(device)
        quickest = min(quickest, time.perf_counter() - started)
    return quickest


def _read_speed(files: tuple[Path, ...]) -> float:
    """Bytes a second over pieces spread evenly through the files."""
    places = [(file, at) for file in files for at in range(0, file.stat().st_size, PIECE_BYTES)]
    sample = places[:: max(1, len(places) // PIECES)]
    read, started = 0, time.perf_counter()
    for file, at in sample:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            read += len(os.pread(descriptor, PIECE_BYTES, at))
        finally:
            os.close(descriptor)
    return max(1, read) / (time.perf_counter() - started)
