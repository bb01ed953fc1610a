"""`nybble doctor`."""

import importlib.metadata
import json
import os
import platform
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import nybble
from nybble import openmp

_NEEDED = ("torch", "transformers", "datasets", "safetensors", "gguf")
_OPTIONAL = ("bitsandbytes", "peft", "triton", "flash-linear-attention", "causal-conv1d", "mamba-ssm")
_VECTOR_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def doctor(
    given: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")] = False,
) -> int:
    """Say what this machine has: versions, processor, memory, kernels."""
    facts = examine()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _show(facts, Console())
    return 0


def examine() -> dict[str, Any]:
    """What `nybble doctor` reports, ready for JSON; sizes in bytes."""
    import torch

    from nybble.kernels import registry
    from nybble.kernels.backends.cpp import library
    from nybble.kernels.hardware import cpu_flags, system_bytes, system_value, why_no_gpu
    from nybble.sources.bundled import cache_folder

    memory = partial(system_bytes, "/proc/meminfo")
    return {
        "nybble": nybble.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in (*_NEEDED, *_OPTIONAL)},
        "cpu": {
            "model": system_value("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "torch_isa": torch.backends.cpu.get_cpu_capability(),
            "vectors": [flag for flag in _VECTOR_FLAGS if flag in cpu_flags()],
        },
        "threads": torch.get_num_threads(),
        "waiting": openmp.SENTENCES[openmp.waiting],
        "memory": {"total_bytes": memory("MemTotal"), "available_bytes": memory("MemAvailable")},
        "cuda": [_gpu(number) for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)],
        "no_cuda": why_no_gpu(),
        "cache": str(cache_folder()),
        "cpu_kernels": library.describe(),
        "kernels": [row._asdict() for row in registry.available()],
    }


def _gpu(number: int) -> dict[str, Any]:
    import torch

    device = torch.cuda.get_device_properties(number)
    return {
        "name": device.name,
        "memory_bytes": device.total_memory,
        "free_bytes": torch.cuda.mem_get_info(number)[0],
        "capability": f"{device.major}.{device.minor}",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _show(facts: dict[str, Any], console: Console) -> None:
    def gigabytes(size: int | None) -> str:
        return "unknown" if size is None else f"{size / 1e9:.1f} GB"

    cpu, memory = facts["cpu"], facts["memory"]
    table = Table(show_header=False, box=None)
    table.add_row("nybble", facts["nybble"])
    table.add_row("Python", f"{facts['python']} on {facts['platform']}")
    for package, version in facts["packages"].items():
        absent = "not installed (optional)" if package in _OPTIONAL else "[red]not installed[/red]"
        table.add_row(package, version or absent)
    table.add_row(
        "processor", f"{cpu['model']}, {cpu['cores']} cores, {', '.join(cpu['vectors']) or 'no vectors known'}"
    )
    table.add_row("threads", str(facts["threads"]))
    table.add_row("threads wait", facts["waiting"])
    table.add_row("memory", f"{gigabytes(memory['available_bytes'])} free of {gigabytes(memory['total_bytes'])}")
    for device in facts["cuda"]:
        free = f"{gigabytes(device['free_bytes'])} free of {gigabytes(device['memory_bytes'])}"
        table.add_row("CUDA", f"{device['name']}, {free}, compute capability {device['capability']}")
    if facts["no_cuda"] is not None:
        table.add_row("CUDA", Text(f"none: {facts['no_cuda']}"))
    built = facts["cpu_kernels"]
    table.add_row(
        "CPU kernels", f"{built['isa']}, {built['compiler']}" if built["available"] else Text(built["reason"])
    )
    table.add_row("cache", facts["cache"])
    console.print(table)

    backends: dict[tuple[str, str, str], list[str]] = {}
    for row in facts["kernels"]:
        backends.setdefault((row["backend"], row["device"], row["reason"]), []).append(row["op"])
    kernels = Table("backend", "device", "available", "ops", title="Kernels", title_justify="left")
    for (backend, device, reason), ops in backends.items():
        kernels.add_row(backend, device, Text(reason or "yes"), ", ".join(ops))
    console.print(kernels)
