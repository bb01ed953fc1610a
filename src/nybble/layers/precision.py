"""Where products run, in which dtype, and on how many threads."""

import torch

from nybble.errors import ConfigError
from nybble.kernels.hardware import PLAIN_DEVICES, multiplies_bf16, plain_devices, why_no_gpu
from nybble.options.groups import ComputeOptions, MachineOptions

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def resolve_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype for "auto", "bf16" or "fp32": auto is bf16 where the device multiplies it in hardware."""
    if name != "auto":
        return _DTYPES[name]
    return torch.bfloat16 if multiplies_bf16(device) else torch.float32


def resolve_device(name: str) -> torch.device:
    """The torch device for "auto", "cpu", "xpu", "mps" or "cuda", which on AMD's cards is ROCm. auto is the CPU where
    there is no such card, beside Apple's and Intel's GPUs too.

    Raises:
        ConfigError: what was asked for is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and (why := why_no_gpu()) is not None:
        raise ConfigError(
            f"device is cuda, but there is no GPU: {why}.", "Allowed here: auto, cpu.", "Use --device cpu."
        )
    if name in PLAIN_DEVICES and name not in plain_devices():
        raise ConfigError(
            f"device is {name}, but PyTorch finds none of {PLAIN_DEVICES[name]} GPUs.",
            f"Allowed here: {', '.join(('auto', 'cpu', *plain_devices()))}.",
            "Leave --device out.",
        )
    return torch.device(name)


def set_up(machine: ComputeOptions) -> tuple[torch.device, torch.dtype]:
    """Where to compute, and in which dtype; the number of threads is set. Without a choice of devices: on the CPU.

    Raises:
        ConfigError: as `resolve_device`.
    """
    if machine.threads:
        torch.set_num_threads(machine.threads)
    device = resolve_device(machine.device if isinstance(machine, MachineOptions) else "cpu")
    return device, resolve_compute_dtype(machine.compute_dtype, device)
