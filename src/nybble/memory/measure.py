"""How much memory this process holds now, and the most it held: the figures that a budget is about."""

import resource
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from nybble.kernels.hardware import system_bytes
from nybble.kernels.heap import lies_in_heap
from nybble.memory.allocators import KEEPS_NO_PEAK, allocator

_CGROUPS = Path("/sys/fs/cgroup")
_CGROUP_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))  # version 2, 1
_MEMINFO_DEFAULT = 8_000_000_000  # where the system does not tell


def anonymous_bytes() -> int:
    """Anonymous resident memory (RssAnon) in bytes; where the system does not tell, the peak resident size."""
    if (anonymous := system_bytes("/proc/self/status", "RssAnon")) is not None:
        return anonymous
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def has_own_memory(device: torch.device) -> bool:
    """Whether a device computes in memory of its own, as a GPU does. Else its tensors lie in this process's heap, a
    budget counts what the process holds, and files that it reads stay in the system's cache beside it.
    """
    return not lies_in_heap(device)


def used_bytes(device: torch.device) -> int:
    """Memory in use that a budget counts: RssAnon on the CPU, the allocator's on a GPU."""
    return int(allocator(device).memory_allocated(device)) if has_own_memory(device) else anonymous_bytes()


def available_bytes(device: torch.device) -> int:
    """Memory that a run may still take: free memory of the device, on the CPU within the process's cgroup."""
    if has_own_memory(device):
        return int(allocator(device).mem_get_info(device)[0])
    free = system_bytes("/proc/meminfo", "MemAvailable") or _MEMINFO_DEFAULT
    return min([free, *_left_in_cgroups()])


def _left_in_cgroups(lines: Iterable[str] | None = None, root: Path = _CGROUPS) -> Iterator[int]:
    """Bytes that each memory cgroup above this process still allows.

    Args:
        lines: of /proc/self/cgroup: "number:controllers:path"; version 2 has one, without controllers.
    """
    membership = Path("/proc/self/cgroup")
    if lines is None:
        lines = membership.read_text().splitlines() if membership.exists() else ()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            for limit_name, used_name in _CGROUP_FILES:
                limit = folder / limit_name
                if limit.exists() and (text := limit.read_text().strip()) != "max":
                    yield int(text) - int((folder / used_name).read_text()) + _cached_files(folder / "memory.stat")
            if folder == top:
                break


def _cached_files(stat: Path) -> int:
    """Of what a cgroup uses, the cached pages of files, which the system takes back when they are needed."""
    lines = (line.split() for line in stat.read_text().splitlines()) if stat.exists() else ()
    found = {name: int(number) for name, number in lines}
    own = found.get("inactive_file", 0) + found.get("active_file", 0)  # version 2, or version 1 without what is below
    return max(own, found.get("total_inactive_file", 0) + found.get("total_active_file", 0))


class PeakMemory:
    """Context manager that samples memory from a thread and keeps the peak, in bytes; of a GPU's allocator also that of
    what it reserved, gaps included.

    Args:
        device: whose memory; where its allocator keeps its own peak, no thread is started.
        interval_s: seconds between samples.
    """

    def __init__(self, device: torch.device, interval_s: float = 0.02):
        self.device, self.interval_s = device, interval_s
        self.start_bytes = self.peak_bytes = self.reserved_bytes = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "PeakMemory":
        self.start_bytes = self.peak_bytes = used_bytes(self.device)
        if has_own_memory(self.device) and self.device.type not in KEEPS_NO_PEAK:
            allocator(self.device).reset_peak_memory_stats(self.device)
        else:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(self.interval_s):
            self._look()

    def _look(self) -> None:
        self.peak_bytes = max(self.peak_bytes, used_bytes(self.device))
        if has_own_memory(self.device):
            self.reserved_bytes = max(self.reserved_bytes, allocator(self.device).memory_reserved(self.device))

    def __exit__(self, *exc_info: object) -> None:
        if self._thread is None:
            self.peak_bytes = allocator(self.device).max_memory_allocated(self.device)
            self.reserved_bytes = allocator(self.device).max_memory_reserved(self.device)
            return
        self._stop.set()
        self._thread.join()
        self._look()
