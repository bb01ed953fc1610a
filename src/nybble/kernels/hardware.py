"""What the hardware of a device can do, and how tensors get there."""

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

from nybble.errors import first_line

FP32_RESULTS = {"cuda"}  # devices whose products of 16-bit matrices can be given in fp32, as they are added up
PLAIN_DEVICES = {"xpu": "Intel's", "mps": "Apple's"}  # GPUs with transformers' modules and plain PyTorch bodies alone
WITHOUT_DOUBLES = {"mps"}  # devices without fp64
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last is ARM's


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has bf16 products in hardware; of Apple's GPUs, the first of which lack them, it is not said."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type in PLAIN_DEVICES:
        return device.type == "xpu"
    return _cpu_multiplies_bf16()


def wide_dtype(device: torch.device) -> torch.dtype:
    """In which a device adds up many numbers: fp64, where it has that."""
    lacking = device.type in WITHOUT_DOUBLES
    lacking |= device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64
    return torch.float32 if lacking else torch.float64


def as_double(tensor: Tensor) -> Tensor:
    """The tensor in the `wide_dtype` of its device."""
    return tensor.to(wide_dtype(tensor.device))


def gives_fp32(device: torch.device) -> bool:
    """Whether `torch.mm` takes an `out_dtype` of fp32 for 16-bit matrices there."""
    return device.type in FP32_RESULTS


def plain_devices() -> list[str]:
    """Those of `PLAIN_DEVICES` that are here."""
    there = {"xpu": torch.xpu.is_available(), "mps": torch.backends.mps.is_available()}
    return [name for name in PLAIN_DEVICES if there[name]]


def describe_unproven(device: torch.device) -> str | None:
    """What is to be said of computing on one of `PLAIN_DEVICES`; None of other devices."""
    if device.type not in PLAIN_DEVICES:
        return None
    maker = PLAIN_DEVICES[device.type]
    return f"nybble was never run on {maker} GPUs: there it computes in plain PyTorch, without kernels of its own"


def why_no_gpu() -> str | None:
    """None where PyTorch computes on a GPU of NVIDIA or AMD, else what is in the way; another GPU is named."""
    if torch.cuda.is_available():
        return None
    for name in plain_devices():
        return f"this machine's GPU is {PLAIN_DEVICES[name]}; it is used where --device {name} asks for it"
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch is built for processors alone"
    try:
        torch.cuda.init()
    except RuntimeError as error:  # no card, no driver, or one too old for this PyTorch
        return first_line(error).rstrip(".")
    return "PyTorch sees no GPU"


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, fp64 as its `wide_dtype`. To a GPU of NVIDIA or AMD it goes through pinned memory, and
    nobody waits until it is there.
    """
    if device.type != "cuda":
        return tensor.to(device, wide_dtype(device) if tensor.dtype == torch.float64 else tensor.dtype)
    return tensor.pin_memory().to(device, non_blocking=True)


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    """Whether the CPU has bf16 products in hardware (AVX512-BF16, AMX, ARM BF16)."""
    on_apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    return on_apple or not _BF16_FLAGS.isdisjoint(cpu_flags())


def cpu_flags() -> list[str]:
    """What the CPU can do, in Linux's words."""
    return (system_value("/proc/cpuinfo", "flags") or system_value("/proc/cpuinfo", "Features") or "").split()


def system_value(path: str, key: str) -> str | None:
    """The value of the first `key: value` line of one of Linux's information files, which other systems lack."""
    if not Path(path).exists():
        return None
    lines = (line.partition(":") for line in Path(path).read_text(encoding="utf-8").splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == key), None)


def system_bytes(path: str, key: str) -> int | None:
    """As `system_value`, of a size that is given in kB."""
    value = system_value(path, key)
    return int(value.removesuffix("kB")) * 1024 if value else None
