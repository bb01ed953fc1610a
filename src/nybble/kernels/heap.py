"""The C library's heap, where tensors under 32 MiB lie on a CPU.

What is freed there stays with the process, and aligned allocations, as PyTorch's are, reuse little of it: through the
modules of a decoder it grows by several times what is alive.
"""

import ctypes
import sys


def give_back_free() -> None:
    """Return what the heap holds free to the system, where the library can (glibc).

    What is returned and needed again is paged in again: at every block of a decoder that costs a third of the time.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
