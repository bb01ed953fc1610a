"""The machine a plan is made for: this one, measured in a moment, or one of a small table."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from nybble.kernels.heap import give_back_free
from nybble.memory.measure import anonymous_bytes, available_bytes

SAFE_SHARE = 0.8  # of the free memory that a run without a budget may take
CUDA_CONTEXT_BYTES = 500_000_000
PROBE_S = 0.1
PROBE_ROWS, PROBE_WIDTH = 512, 1536
PIECE_BYTES, PIECES = 4_194_304, 16
COPY_BYTES = 16_777_216


@dataclass(frozen=True)
class Machine:
    """What bounds a run.

    Args:
        name: for the user.
        kind: "cpu" or "cuda".
        budget_bytes: what the run may take, its process included; on CUDA of the device's memory.
        process_bytes: of it, what the process takes before anything is loaded.
        host_bytes: memory beside a GPU; on a CPU, memory beyond the budget, which caches files.
        flops: sustained by large matrix products in the compute dtype, a second.
        ram_bytes_per_s: of a copy, each byte counted once.
        link_bytes_per_s: host to device; on a CPU as `ram_bytes_per_s`.
        disk_bytes_per_s: of large sequential reads.
    """

    name: str
    kind: str
    budget_bytes: int
    process_bytes: int
    host_bytes: int
    flops: float
    ram_bytes_per_s: float
    link_bytes_per_s: float
    disk_bytes_per_s: float


# Assumed, not measured: about 60 % of the dense bf16 figure of a card of that memory, its memory at 80 % of its
# bandwidth, PCIe 4 x16, an NVMe disk.
_GPUS = {
    "12GB-gpu": (12e9, 30e12, 350e9),
    "16GB-gpu": (16e9, 45e12, 450e9),
    "24GB-gpu": (24e9, 80e12, 800e9),
    "48GB-gpu": (48e9, 150e12, 750e9),
    "80GB-gpu": (80e9, 400e12, 1600e9),
}
_LINK, _DISK = 20e9, 2.5e9


def named_machine(name: str, memory: int | None, host_memory: int | None) -> Machine:
    """A machine of the table, with other sizes where they are given."""
    total, flops, bandwidth = _GPUS[name]
    host = host_memory or 2 * int(total)
    return Machine(
        name, "cuda", memory or int(total), CUDA_CONTEXT_BYTES, host, flops, bandwidth, _LINK, _DISK
    )  # fmt: skip


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
    give_back_free()
    free = available_bytes(device)
    process = anonymous_bytes() if device.type == "cpu" else CUDA_CONTEXT_BYTES
    total = free + (process if device.type == "cpu" else 0)
    budget = min(memory, total) if memory else process + int(SAFE_SHARE * free)
    host = host_memory or (max(0, total - budget) if device.type == "cpu" else available_bytes(torch.device("cpu")))
    flops, copy = _product_speed(device, dtype), _copy_speed(device)
    link = copy if device.type == "cpu" else _LINK
    disk = _read_speed(model_files) if model_files else copy
    return Machine(f"this machine's {device.type}", device.type, budget, process, host, flops, copy, link, disk)


def _product_speed(device: torch.device, dtype: torch.dtype) -> float:
    a = torch.ones(PROBE_ROWS, PROBE_WIDTH, device=device, dtype=dtype)
    b = torch.ones(PROBE_WIDTH, PROBE_WIDTH, device=device, dtype=dtype)
    out = a @ b.T
    return 2.0 * PROBE_ROWS * PROBE_WIDTH**2 / _seconds(lambda: torch.mm(a, b.T, out=out), device)


def _copy_speed(device: torch.device) -> float:
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return COPY_BYTES / _seconds(lambda: target.copy_(source), device)


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """The quickest of the calls that fit into PROBE_S."""
    quickest, end = float("inf"), time.perf_counter() + PROBE_S
    while time.perf_counter() < end or quickest == float("inf"):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
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
