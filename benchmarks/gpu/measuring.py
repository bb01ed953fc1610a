"""Times, memory, waits and idle moments of a call."""

import time
import warnings
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from gpu.check import NO_CARD, Check


def measured(check: Check, step: Callable[[], object], repeats: int | None = None) -> dict[str, Any]:
    """Most bytes that tensors took, and that the allocator held, in a first step, and the time of those after it; or
    that memory ran out.
    """
    import torch

    try:
        if check.on_card:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step()
        seconds = seconds_of(check, step, warm_up=0 if check.tiny else 1, batches=False, repeats=repeats)
    except torch.OutOfMemoryError:
        return {"result": "out of memory"}
    if not check.on_card:
        return {"seconds": seconds, "allocated": NO_CARD, "reserved": NO_CARD}
    memory = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {"seconds": seconds, **memory}


def seconds_of(
    check: Check, call: Callable[[], object], warm_up: int = 1, batches: bool = True, repeats: int | None = None
) -> float:
    """Median of a few.

    Args:
        batches: short calls are timed several at a time, so that launching them does not count.
    """
    import torch

    def once(number: int) -> float:
        if not check.on_card:
            started = time.perf_counter()
            for _ in range(number):
                call()
            return (time.perf_counter() - started) / number
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(number):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / number

    for _ in range(warm_up):
        call()
    first = once(1)
    number = max(1, min(20, int(5e-3 / max(first, 1e-6)))) if batches and not check.tiny else 1
    return median([once(number) for _ in range(repeats or check.repeats)])


def copy_rate(check: Check, num_bytes: int, source: str) -> float:
    """Bytes a second that arrive on the device."""
    import torch

    pinned = check.on_card and source == "cpu"
    data = torch.empty(2**20 if check.tiny else num_bytes, dtype=torch.uint8, device=source, pin_memory=pinned)
    target = torch.empty_like(data, device=check.device)
    return len(data) / seconds_of(check, lambda: target.copy_(data, non_blocking=True))


def waits(check: Check, call: Callable[[], object]) -> int | str:
    """How often the host waits for the card during a call."""
    import torch

    if not check.on_card:
        return NO_CARD
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        call()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def profiled(call: Callable[[], object]) -> dict[str, Any]:
    """Share of a call's time in which the card was idle, launches, and what took longest."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    by_name: dict[str, float] = {}
    for start, end, name in spans:
        by_name[name[:80]] = by_name.get(name[:80], 0.0) + (end - start) / 1e3
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:15]
    return {"idle": idle_share([span[:2] for span in spans]), "launches": len(spans), "top_ms": dict(longest)}


def idle_share(spans: Sequence[tuple[float, float]]) -> float | None:
    """Of the time from the first start to the last end, the share that no span covers; they may overlap."""
    if not spans:
        return None
    ordered = sorted(spans)
    covered, reached = 0.0, ordered[0][0]
    for start, end in ordered:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - covered / (reached - ordered[0][0])
