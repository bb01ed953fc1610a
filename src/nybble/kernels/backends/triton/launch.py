"""How every kernel is started."""

import os
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WARPS = 4  # of a program
# Of a program. The interpreter takes some milliseconds for a program, whatever its size.
THREADS = 4096 if INTERPRETED else WARPS * (64 if torch.version.hip else 32)
MAX_ELEMENTS = 2**31 - 2**16  # offsets have 32 bits, and a last program counts past the end


def launch(kernel: Any, programs: int, *arguments: Any, num_warps: int = WARPS, **constants: Any) -> None:
    """Start `programs` programs on the device of the first argument, a tensor; products and sums stay two operations,
    each rounded, as in the reference.
    """
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, num_warps=num_warps, enable_fp_fusion=False, **constants)


def too_many(elements: int) -> str | None:
    """None, or that there are more elements than a kernel can count."""
    return None if elements <= MAX_ELEMENTS else f"takes at most {MAX_ELEMENTS:,} elements, not {elements:,}"
