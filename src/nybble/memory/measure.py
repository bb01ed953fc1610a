"""How much memory this process holds now, and the most it held: the figures that a budget is about."""

import resource
import sys
import threading
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMIT, _CGROUP_USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
_MEMINFO_DEFAULT = 8_000_000_000  # where the system does not tell


def anonymous_bytes() -> int:
    """Anonymous resident memory (RssAnon) in bytes; where the system does not tell, the peak resident size."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def used_bytes(device: torch.device) -> int:
    """Memory in use that a budget counts: RssAnon on the CPU, the allocator's on CUDA."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else anonymous_bytes()


def available_bytes(device: torch.device) -> int:
    """Memory that a run may still take: free memory of the device, on the CPU within the process's cgroup."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _MEMINFO_DEFAULT
    if _MEMINFO.exists():
        lines = (line.split() for line in _MEMINFO.read_text().splitlines())
        free = next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")
    if _CGROUP_LIMIT.exists() and (limit := _CGROUP_LIMIT.read_text().strip()) != "max":
        free = min(free, int(limit) - int(_CGROUP_USED.read_text()))
    return free


class PeakMemory:
    """Context manager that samples memory from a thread and keeps the peak, in bytes.

    Args:
        device: whose memory; CUDA's allocator keeps its own peak, so no thread is started there.
        interval_s: seconds between samples on the CPU.
    """

    def __init__(self, device: torch.device, interval_s: float = 0.02):
        self.device, self.interval_s = device, interval_s
        self.start_bytes = self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "PeakMemory":
        self.start_bytes = self.peak_bytes = used_bytes(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(self.interval_s):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())

    def __exit__(self, *exc_info: object) -> None:
        if self._thread is None:
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
            return
        self._stop.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, anonymous_bytes())
