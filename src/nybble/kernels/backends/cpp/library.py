"""The library of csrc/: found and loaded here with ctypes, and how its kernels take their arguments.

The library is optional. Without a compiler at install time there is none, the registry says so, and the reference
bodies run. It is loaded after torch, so that both use torch's OpenMP pool (csrc/runtime.cpp, CMakeLists.txt).

NYBBLE_CPU_LIBRARY names another library file; NYBBLE_CPU_ISA=portable|avx2|avx512|avx512bf16|amx asks for that body.
"""

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.errors import KernelError

ABI = 7  # nybble_cpu_abi() in csrc/runtime.cpp
ISAS = ("portable", "avx2", "avx512", "avx512bf16", "amx")  # in the order of csrc/dispatch.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/vec.h, NybbleDtype
LIBRARY_VARIABLE, ISA_VARIABLE = "NYBBLE_CPU_LIBRARY", "NYBBLE_CPU_ISA"

POINTER, INT, INT64, FLOAT, DOUBLE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_double
ROWS = (POINTER, INT64)  # a pointer and the distance between tokens

# ---- the library ---------------------------------------------------------------------------------


def library_path() -> Path:
    """Where the library is, or would be if it had been built."""
    if asked := os.environ.get(LIBRARY_VARIABLE):
        return Path(asked)
    suffix = "dylib" if sys.platform == "darwin" else "so"
    # Joined before it becomes a path: an editable install spreads the package over two folders.
    return Path(str(resources.files("nybble.kernels") / f"libnybble_cpu.{suffix}"))


@functools.cache
def load() -> ctypes.CDLL:
    """The loaded library, on the instruction set asked for.

    Raises:
        KernelError: there is no library, it is of another version, or this CPU lacks the instruction set asked for.
    """
    path = library_path()
    if not path.is_file():
        raise KernelError(f"{path} does not exist", fix=f"Correct {LIBRARY_VARIABLE}, or build the kernels.")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"{path} cannot be loaded: {error}", fix="Reinstall nybble.") from error
    if library.nybble_cpu_abi() != ABI:
        raise KernelError(f"{path} has interface {library.nybble_cpu_abi()}, not {ABI}", fix="Reinstall nybble.")
    library.nybble_cpu_compiler.restype = ctypes.c_char_p
    if asked := os.environ.get(ISA_VARIABLE):
        _set_isa(library, asked)
    return library


def why_unavailable() -> str | None:
    """None when the kernels can run here, else the reason.

    Raises:
        KernelError: a library is there, or was named in NYBBLE_CPU_LIBRARY, and does not do what was asked for.
    """
    if not os.environ.get(LIBRARY_VARIABLE) and not library_path().is_file():
        return "not built (no compiler at install)"
    load()
    return None


def function(name: str, *argument_types: type) -> Callable[..., None]:
    """The kernel `nybble_<name>`, bound when first called. A pointer is an integer (`pointer`) or None.

    A call raises MemoryError where the kernel could not allocate its scratch memory; nothing was computed then.
    """

    @functools.cache
    def bind() -> Callable[..., None]:
        symbol = load()[f"nybble_{name}"]
        symbol.argtypes, symbol.restype = argument_types, None
        return symbol

    def call(*arguments: Any) -> None:
        bind()(*arguments)
        if load().nybble_cpu_ran_out_of_memory():
            raise MemoryError(f"{name} could not allocate its scratch memory")

    return call


def supported_isas() -> tuple[str, ...]:
    """The instruction sets whose bodies this CPU can run, lowest first."""
    return ISAS[: load().nybble_cpu_best_isa() + 1]


def current_isa() -> str:
    return ISAS[load().nybble_cpu_isa()]


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Within the block the bodies of instruction set `name` run; for the whole process.

    Raises:
        KernelError: an unknown name, or one that this CPU lacks.
    """
    previous = current_isa()
    _set_isa(load(), name)
    try:
        yield
    finally:
        _set_isa(load(), previous)


def _set_isa(library: ctypes.CDLL, name: str) -> None:
    allowed = ISAS[: library.nybble_cpu_best_isa() + 1]
    if name not in allowed:
        raise KernelError(
            f"The instruction set {name!r} was asked for.",
            f"This CPU runs the kernels for {', '.join(allowed)}.",
            f"Unset or correct {ISA_VARIABLE}.",
        )
    library.nybble_cpu_set_isa(ISAS.index(name))


def num_threads() -> int:
    """Threads that the next kernel will use; follows torch.set_num_threads."""
    return int(load().nybble_cpu_num_threads())


def describe() -> dict[str, Any]:
    """For `nybble doctor`: path, and either why the kernels are unavailable or isa, isas, threads, compiler."""
    path = str(library_path())
    if reason := why_unavailable():
        return {"path": path, "available": False, "reason": reason}
    return {
        "path": path,
        "available": True,
        "isa": current_isa(),
        "isas": list(supported_isas()),
        "threads": num_threads(),
        "compiler": load().nybble_cpu_compiler().decode(),
    }


# ---- arguments -----------------------------------------------------------------------------------


def pointer(tensor: Tensor | None) -> int | None:
    """What a POINTER argument takes; None is a null pointer."""
    return None if tensor is None else tensor.data_ptr()


def rows(x: Tensor | None) -> tuple[int | None, int]:
    """What ROWS arguments take."""
    return (None, 0) if x is None else (x.data_ptr(), x.stride(0))


def sizes(x: Tensor) -> tuple[int, int, int]:
    """Tokens, heads, width."""
    return x.shape[0], x.shape[1] if x.dim() == 3 else 1, x.shape[-1]


def no_fp16(*arguments: object) -> str | None:
    """For ops without a body in fp16."""
    if any(isinstance(argument, Tensor) and argument.dtype == torch.float16 for argument in arguments):
        return "has no fp16 body for this op"
    return None
