"""Limits for code that comes with a model: a chat template may take so much time and memory, and no more.

transformers renders templates in Jinja's immutable sandbox, which keeps them from the machine, but not from loops that
never end or strings that fill it.
"""

import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import FrameType


class TimeIsUpError(BaseException):
    """Not an Exception: Jinja evaluates constants while it compiles, and swallows every Exception there."""


@contextmanager
def limited(seconds: float, num_bytes: int) -> Iterator[None]:
    """Run a block that may take `seconds` of processor time and `num_bytes` more memory than is in use.

    Time is limited in the main thread only, memory on Linux only.

    Raises:
        TimeIsUpError: it took longer.
        MemoryError: it asked for more.
    """
    with ExitStack() as limits:
        if sys.platform == "linux":
            limits.enter_context(_limited_memory(num_bytes))
        if threading.current_thread() is threading.main_thread():
            limits.enter_context(_limited_time(seconds))
        yield


@cache
def _statm(process: int) -> int:
    """A descriptor of what the system says of this process's memory: opening it takes longer than a small template."""
    return os.open("/proc/self/statm", os.O_RDONLY)


@contextmanager
def _limited_memory(num_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(os.pread(_statm(os.getpid()), 64, 0).split()[0]) * resource.getpagesize()
    most = used + num_bytes if before[0] == resource.RLIM_INFINITY else min(before[0], used + num_bytes)
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _limited_time(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeIsUpError

    before = signal.signal(signal.SIGVTALRM, stop)
    # Again and again: Python drops what is raised while a finaliser or a callback of its garbage collector runs.
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
