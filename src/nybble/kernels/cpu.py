"""The C++ kernels of csrc/: found and loaded here with ctypes, registered as the backend "cpp".

The library is optional. Without a compiler at install time there is none, the registry says so, and the reference
bodies run. It is loaded after torch, so that both use torch's OpenMP pool (csrc/runtime.cpp, CMakeLists.txt).

NYBBLE_CPU_LIBRARY names another library file; NYBBLE_CPU_ISA=portable|avx2|avx512|avx512bf16 asks for that body.
"""

import ctypes
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.errors import KernelError
from nybble.formats import blockwise, codebooks
from nybble.formats.double_quant import quantize_scales
from nybble.formats.format import FORMATS
from nybble.formats.quant_spec import QuantSpec
from nybble.formats.quantized_tensor import ScaleParts, split_scales
from nybble.kernels import registry

ABI = 3  # nybble_cpu_abi() in csrc/runtime.cpp
ISAS = ("portable", "avx2", "avx512", "avx512bf16")  # in the order of csrc/dispatch.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/vec.h, NybbleDtype
LIBRARY_VARIABLE, ISA_VARIABLE = "NYBBLE_CPU_LIBRARY", "NYBBLE_CPU_ISA"

POINTER, INT, INT64, FLOAT, DOUBLE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_double


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


registry.register_backend("cpp", devices=("cpu",), probe=why_unavailable)


# ---- four bits -----------------------------------------------------------------------------------

_quantize = function("quantize", POINTER, INT, INT64, INT64, INT, POINTER, POINTER, POINTER, POINTER, POINTER)
_quantize_scales = function("quantize_scales", POINTER, INT64, FLOAT, POINTER, POINTER, POINTER, POINTER)
_dequantize = function("dequantize", *[POINTER] * 8, INT, INT64, INT64, INT, POINTER)


@functools.cache
def _sixteen_values(format: str) -> Tensor:
    """A format's values, padded with zeros: a lookup reads a whole register."""
    values = codebooks.codebook(format)
    return F.pad(values, (0, 16 - len(values)))


def pointer(tensor: Tensor | None) -> int | None:
    """What a POINTER argument takes; None is a null pointer."""
    return None if tensor is None else tensor.data_ptr()


@registry.register("quantize_4bit", "cpp")
def quantize_4bit(weight: Tensor, format: str, block_size: int, double_quant: bool) -> tuple[Tensor, Tensor]:
    spec = QuantSpec(format, block_size, double_quant)
    numel = weight.numel()
    packed = weight.new_empty(spec.packed_shape(tuple(weight.shape)), dtype=torch.uint8)
    scales = weight.new_empty(spec.scales_bytes(numel), dtype=torch.uint8)
    parts = split_scales(scales, spec, numel)
    absmax = weight.new_empty(spec.num_blocks(numel), dtype=torch.float32) if parts.absmax is None else parts.absmax
    _quantize(
        pointer(weight), DTYPES[weight.dtype], numel, block_size, spec.bits,
        pointer(codebooks.midpoints(format)), pointer(codebooks.sorted_order(format)),
        pointer(packed), pointer(absmax), pointer(parts.zero_points),
    )  # fmt: skip
    if not absmax.isfinite().all():
        blockwise.quantize(weight, spec)  # raises, and says what is wrong with the weight
    if double_quant:
        _quantize_scales_into(absmax, parts)
    return packed, scales


def _quantize_scales_into(absmax: Tensor, parts: ScaleParts) -> None:
    assert parts.offset is not None and parts.codes is not None and parts.absmax2 is not None
    parts.offset.copy_(absmax.mean())
    offset = parts.offset.item()
    midpoints, first_code = code_search()
    _quantize_scales(
        pointer(absmax), absmax.numel(), offset, pointer(midpoints), pointer(first_code),
        pointer(parts.codes), pointer(parts.absmax2),
    )  # fmt: skip
    if not (math.isfinite(offset) and parts.absmax2.isfinite().all()):
        quantize_scales(absmax)  # raises, and says what is wrong


@functools.cache
def code_search() -> tuple[Tensor, Tensor]:
    """Midpoints of the 8-bit map and an infinity, fp32 [256]; for each 15-bit beginning of an fp32 value, the
    code of the least value that begins so, uint8 [32768]."""
    values = codebooks.dynamic_map()
    midpoints = (values[:-1] + values[1:]) / 2
    start = torch.arange(1 << 15, dtype=torch.int64) << 17
    least = torch.where(start < 1 << 31, start, start + (1 << 17) - 1)  # below zero, more bits mean less
    least = (least - ((least >> 31) << 32)).to(torch.int32).view(torch.float32)
    first_code = torch.bucketize(least.nan_to_num(0.0, torch.inf, -torch.inf), midpoints)
    return torch.cat([midpoints, torch.tensor([torch.inf])]), first_code.to(torch.uint8)


@registry.register("dequantize_4bit", "cpp")
def dequantize_4bit(
    packed: Tensor,
    scales: Tensor,
    shape: Sequence[int],
    format: str,
    block_size: int,
    double_quant: bool,
    dtype: torch.dtype,
) -> Tensor:
    out = packed.new_empty(tuple(shape), dtype=dtype)
    dequantize_4bit_out(packed, scales, shape, format, block_size, double_quant, out)
    return out


@registry.register("dequantize_4bit_out", "cpp")
def dequantize_4bit_out(
    packed: Tensor,
    scales: Tensor,
    shape: Sequence[int],
    format: str,
    block_size: int,
    double_quant: bool,
    out: Tensor,
) -> None:
    _dequantize(
        pointer(packed), *scale_pointers(scales, format, block_size, double_quant, out.numel()),
        pointer(_sixteen_values(format)), FORMATS[format].bits,
        out.numel(), block_size, DTYPES[out.dtype], pointer(out),
    )  # fmt: skip


def scale_pointers(
    scales: Tensor, format: str, block_size: int, double_quant: bool, numel: int
) -> tuple[int | None, ...]:
    """The six scale arguments of the kernels, in the order of `Scales` in csrc/four_bit.h."""
    absmax, codes, absmax2, offset, zero_points = _scale_offsets(format, block_size, double_quant, numel)
    base = scales.data_ptr()
    return (
        None if absmax is None else base + absmax,
        None if codes is None else base + codes,
        None if codes is None else codebooks.dynamic_map().data_ptr(),
        None if absmax2 is None else base + absmax2,
        None if offset is None else base + offset,
        None if zero_points is None else base + zero_points,
    )


@functools.cache
def _scale_offsets(format: str, block_size: int, double_quant: bool, numel: int) -> tuple[int | None, ...]:
    """Where the parts begin in a scales tensor, in bytes. Kept: views made at every call would cost generation more
    than small products do."""
    spec = QuantSpec(format, block_size, double_quant)
    layout = torch.empty(spec.scales_bytes(numel), dtype=torch.uint8, device="cpu")
    parts = split_scales(layout, spec, numel)
    return tuple(
        None if part is None else part.data_ptr() - layout.data_ptr()
        for part in (parts.absmax, parts.codes, parts.absmax2, parts.offset, parts.zero_points)
    )
