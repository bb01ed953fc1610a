"""Triton's kernels compiled for cards that are not here: no spills, no fused multiply-adds where results are to the
bit, and as many registers as triton_registers.json says.

A kernel is added by a line in KERNELS. Where other registers are meant: `python tests/kernels/test_triton_compiled.py`
rewrites the file.
"""

import json
import re
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nybble.formats.format import FORMATS
from nybble.kernels.backends.reference.calibration import REFITS
from nybble.kernels.backends.triton import calibration as calibration_bodies
from nybble.kernels.backends.triton.cached_attention import COLUMNS as CACHE_COLUMNS
from nybble.kernels.backends.triton.cached_attention import MOST_PARTS
from nybble.kernels.backends.triton.launch import INTERPRETED, MAX_WARPS, PER_WARP, TILE, WARPS, tile_of
from nybble.kernels.backends.triton.loss import COLUMNS
from nybble.kernels.ops.calibration import MAX_ROWS
from nybble.kernels.ops.optimizer import ADAMW_BLOCK

if INTERPRETED:
    pytest.skip("the interpreter runs, not the compiler", allow_module_level=True)
triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from nybble.kernels.backends.triton.jit import (  # noqa: E402
    cached_attention,
    calibration,
    four_bit,
    glu,
    loss,
    norm,
    optimizer,
    rope,
)

REGISTERS = Path(__file__).with_name("triton_registers.json")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DEFAULT = ("sm_80", "sm_90", "gfx942")


# ---- kernels -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """A kernel as a body starts it.

    Args:
        function: decorated by `triton.jit`.
        arguments: name -> type: `*bf16` is a pointer, `i32` a number; with `:16` a multiple of 16, as those
            of whole tensors are. Triton compiles another kernel where they are not.
        constants: name -> value; of `THREADS` and `WARP`, the threads of a program and of a warp.
        exact: results are the reference's to the bit.
        stack: target -> bytes of it: what is stored once before all loops and loaded once after them.
    """

    function: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    exact: bool = False
    num_warps: int = WARPS
    stack: dict[str, int] = field(default_factory=dict)


THREADS, WARP = "threads", "warp"


def dequantize(dtype: str = "bf16", per_word: int = 8, **constants: Any) -> Kernel:
    tables = {"levels": "*fp32:16", "dynamic_map": "*fp32:16"}
    arguments = {"packed": "*u8:16", "scales": "*u8:16", **tables, "out": f"*{dtype}:16"}
    arguments |= dict.fromkeys(("numel", "columns", "gap"), "i32:16")
    default = {"GAPS": None, "BITS": 4, "ZERO_POINTS": False, "DOUBLE_QUANT": True, "BLOCK_SIZE": 64, "WORDS": THREADS}
    return Kernel(four_bit.dequantize_kernel, arguments, default | {"PER_WORD": per_word} | constants, exact=True)


def quantize(format: str, block_size: int = 64, dtype: str = "bf16") -> Kernel:
    entry = FORMATS[format]
    constants = {"BITS": entry.bits, "SIGNED": entry.signed, "ZERO_POINTS": entry.zero_points}
    return blocks(four_bit.quantize_kernel, block_size, {"weight": f"*{dtype}:16"}, **constants)


def search(block_size: int = 64) -> Kernel:
    constants = {"BITS": 4, "GRID": True, "REFITS": REFITS}
    types = dict.fromkeys(("period", "num_starts"), "i32")
    kernel = blocks(calibration.search_scales_kernel, block_size, types, calibration_bodies.PER_WARP, **constants)
    return kernel if block_size > 64 else replace(kernel, stack={"sm_86": 8, "sm_89": 8, "sm_120": 16})


def blocks(function: Any, block_size: int, types: dict[str, str], per_warp: int = PER_WARP, **constants: Any) -> Kernel:
    """A kernel that `launch_tiles` starts on blocks."""
    tile_rows, columns, num_warps = tile_of(block_size, True, per_warp)
    constants |= {"ROWS": tile_rows, "COLUMNS": columns}
    types = {"rows": "i32", **dict.fromkeys(("numel", "width"), "i32:16")} | types
    types |= dict.fromkeys(("order", "packed", "zero_points", "codes_out", "indices_out"), "*u8:16")
    arguments = {name: types.get(name, "*fp32:16") for name in function.arg_names if name not in constants}
    return Kernel(function, arguments, constants, num_warps=num_warps)


def gemv(dtype: str = "bf16", rows: int = 1, per_word: int = 8, **constants: Any) -> Kernel:
    types = {"x": f"*{dtype}:16", "y": f"*{dtype}:16", "packed": "*u8:16", "scales": "*u8:16"}
    types |= {"levels": "*fp32:16", "dynamic_map": "*fp32:16"}
    types |= {"rows": "i32", "out_features": "i32", "in_features": "i32:16"}
    default = {"BITS": 4, "ZERO_POINTS": False, "DOUBLE_QUANT": True, "BLOCK_SIZE": 64}
    default |= {"PER_WORD": per_word, "ROWS": rows, "OUTPUTS": WARPS, "WORDS": WARP}
    return Kernel(four_bit.gemv_kernel, types, default | constants)


def assign() -> Kernel:
    types = dict.fromkeys(("order", "indices_out"), "*u8:16") | {"rows": "i32", "columns": "i32:16"}
    constants = {"BITS": 4, "ROWS": MAX_ROWS, "COLUMNS": calibration_bodies.COLUMNS}
    function = calibration.assign_columns_kernel
    arguments = {name: types.get(name, "*fp32:16") for name in function.arg_names if name not in constants}
    return Kernel(function, arguments, constants, num_warps=1)


def rows(
    function: Any, width: int, dtype: str = "bf16", whole_rows: bool = False, exact: bool = False, **constants: bool
) -> Kernel:
    """A kernel that `launch_tiles` starts on rows of such a width, in 8B shapes a multiple of 16."""
    types = {"weight": f"*{dtype}:16", "rows": "i32", "eps": "fp32", "weight_offset": "fp32"}
    types |= dict.fromkeys(("rstd", "stats", "cos", "sin"), "*fp32:16")
    inner = ("gate", "up", "grad_gate", "grad_up", "grad_x", "act")
    types |= dict.fromkeys(("x", "out", "grad", "bias", *inner), f"*{dtype}:16")
    tile_rows, columns, num_warps = tile_of(width, whole_rows)
    constants = constants | {"ROWS": tile_rows, "COLUMNS": columns}
    arguments = {name: types.get(name, "i32:16") for name in function.arg_names if name not in constants}
    return Kernel(function, arguments, constants, exact, num_warps)


def cached(dtype: str = "bf16", width: int = 128, softcap: bool = False) -> Kernel:
    types = {"heads": f"*{dtype}:16", "keys": f"*{dtype}:16", "values": f"*{dtype}:16", "heads_stride": "i32"}
    types |= dict.fromkeys(("texts", "columns", "starts"), "*i64:16")
    types |= dict.fromkeys(("maxima", "sums", "outputs"), "*fp32:16") | {"scale": "fp32", "softcap": "fp32"}
    types |= {"num_heads": "i32:16", "head_dim": "i32:16", "capacity": "i32:16"}
    function = cached_attention.cached_attention_kernel
    constants = {"SOFTCAP": softcap, "PARTS": MOST_PARTS, "COLUMNS": CACHE_COLUMNS, "WIDTH": width}
    arguments = {name: types.get(name, "i32") for name in function.arg_names if name not in constants}
    return Kernel(function, arguments, constants)


def join() -> Kernel:
    arguments = dict.fromkeys(("maxima", "sums", "outputs"), "*fp32:16") | {"out": "*bf16:16", "head_dim": "i32:16"}
    return Kernel(cached_attention.join_kernel, arguments, {"PARTS": MOST_PARTS, "WIDTH": 128})


def cross_entropy(dtype: str) -> Kernel:
    arguments = {"logits": f"*{dtype}:16", "targets": "*i64:16", "losses": "*fp32:16"}
    arguments |= {"vocabulary": "i32:16", "stride": "i32:16", "gradient_scale": "*fp32:16"}
    return Kernel(loss.cross_entropy_kernel, arguments, {"COLUMNS": COLUMNS}, num_warps=MAX_WARPS)


def adamw(function: Any, **constants: int) -> Kernel:
    types = {"exp_avg": "*u8:16", "exp_avg_sq": "*u8:16"} if constants.keys() == {"BLOCKS", "BLOCK_SIZE"} else {}
    names = [name for name in function.arg_names if name not in constants]
    numbers = names[names.index("numel") + 1 :]
    types |= {"numel": "i32:16", **dict.fromkeys(numbers, "fp32")}
    return Kernel(function, {name: types.get(name, "*fp32:16") for name in names}, constants)


KERNELS = {
    "dequantize nf4": dequantize(),
    "dequantize nf4, fp16": dequantize("fp16"),
    "dequantize nf4, fp32": dequantize("fp32"),
    "dequantize nf4, bytes": dequantize(per_word=2),
    "dequantize nf4, scales in fp32": dequantize(DOUBLE_QUANT=False),
    "dequantize int4_asym": dequantize(ZERO_POINTS=True),
    "dequantize nf4, wide rows": dequantize(GAPS="words"),
    "dequantize nf3": dequantize(BITS=3),
    "dequantize nf2": dequantize(BITS=2),
    **{f"quantize {format}": quantize(format) for format in ("nf4", "int4_asym", "nf3", "nf2")},
    "quantize nf4, blocks of 4096": quantize("nf4", 4096, "fp32"),
    "quantize nf3, blocks of 4096": quantize("nf3", 4096),
    "gemv nf4": gemv(),
    "gemv nf4, 8 rows": gemv(rows=8),
    "gemv nf4, 8 rows, fp32": gemv("fp32", 8, DOUBLE_QUANT=False),
    "gemv nf4, bytes": gemv(per_word=2),
    "gemv int4_asym": gemv(ZERO_POINTS=True),
    "gemv nf3": gemv(BITS=3),
    "gemv nf2": gemv(BITS=2),
    "search_scales": search(),
    "search_scales, blocks of 4096": search(4096),
    "assign_columns": assign(),
    "rms_norm": rows(norm.rms_norm_kernel, 4096, whole_rows=True),
    "rms_norm, widest": rows(norm.rms_norm_kernel, 16384, "fp32", whole_rows=True),
    "rms_norm_backward": rows(norm.rms_norm_backward_kernel, 4096, whole_rows=True, ACCUMULATE=True),
    "rms_norm_backward, widest": rows(norm.rms_norm_backward_kernel, 16384, "fp32", whole_rows=True, ACCUMULATE=True),
    "rms_norm_backward, heads": rows(norm.rms_norm_backward_kernel, 128, whole_rows=True, ACCUMULATE=False),
    "layer_norm": rows(norm.layer_norm_kernel, 4096, whole_rows=True, BIAS=True),
    "layer_norm, widest": rows(norm.layer_norm_kernel, 16384, "fp32", whole_rows=True, BIAS=True),
    "layer_norm_backward": rows(norm.layer_norm_backward_kernel, 4096, whole_rows=True, ACCUMULATE=True),
    "layer_norm_backward, widest": rows(
        norm.layer_norm_backward_kernel, 16384, "fp32", whole_rows=True, ACCUMULATE=True
    ),
    "rope": rows(rope.rope_kernel, 64, exact=True, NEIGHBOURS=False, BACKWARD=True),
    "rope, neighbours": rows(rope.rope_kernel, 64, exact=True, NEIGHBOURS=True, BACKWARD=True),
    "swiglu": rows(glu.glu_kernel, 14336, GELU=False),
    "swiglu_backward": rows(glu.glu_backward_kernel, 14336, GELU=False, ACT=True),
    "swiglu_backward, fp32": rows(glu.glu_backward_kernel, 14336, "fp32", GELU=False, ACT=True),
    "geglu": rows(glu.glu_kernel, 14336, GELU=True),
    "geglu_backward": rows(glu.glu_backward_kernel, 14336, GELU=True, ACT=True),
    "gelu": rows(glu.gelu_kernel, 14336),
    "gelu_backward": rows(glu.gelu_backward_kernel, 14336, ACT=True),
    "cached_attention": cached(),
    "cached_attention, wide heads, soft cap": cached(width=256, softcap=True),
    "cached_attention, fp32": cached("fp32"),
    "cached_attention, parts joined": join(),
    "cross_entropy": cross_entropy("bf16"),
    "cross_entropy, fp32": cross_entropy("fp32"),
    "adamw": adamw(optimizer.adamw_kernel, ELEMENTS=TILE),
    "adamw, 8 bits": adamw(optimizer.adamw_8bit_kernel, BLOCKS=TILE // ADAMW_BLOCK, BLOCK_SIZE=ADAMW_BLOCK),
}


# ---- compiling -----------------------------------------------------------------------------------


class Compiled(NamedTuple):
    registers: int
    spills: int
    fused: list[str]  # of exact kernels, instructions that multiply and add in fp32 without rounding between


def compiled(kernel: Kernel, target: GPUTarget, folder: Path) -> Compiled:
    threads = {THREADS: kernel.num_warps * target.warp_size, WARP: target.warp_size}
    constants = {name: threads.get(value, value) for name, value in kernel.constants.items()}
    assert {*kernel.arguments, *constants} == {*kernel.function.arg_names}
    types = {name: kernel.arguments.get(name, "constexpr").split(":") for name in kernel.function.arg_names}
    signature = {name: type for name, (type, *_) in types.items()}
    attributes = {(at,): [["tt.divisibility", 16]] for at, (_, *multiple) in enumerate(types.values()) if multiple}
    made = triton.compile(
        ASTSource(kernel.function, signature, constants, attributes),
        target=target,
        options={"num_warps": kernel.num_warps, "enable_fp_fusion": False},
    )
    return of_amd(made.asm["amdgcn"]) if target.backend == "hip" else of_nvidia(made.asm["cubin"], folder, kernel.exact)


def of_nvidia(cubin: bytes, folder: Path, exact: bool) -> Compiled:
    (path := folder / "kernel.cubin").write_bytes(cubin)

    def output(*command: str) -> str:
        return subprocess.run(
            [TOOLS / command[0], *command[1:], path], check=True, capture_output=True, text=True
        ).stdout

    usage = output("cuobjdump", "-res-usage")
    number = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
    fused = re.findall(r"\bFFMA\S*", output("nvdisasm", "-c")) if exact else []  # as long as all else of a small kernel
    return Compiled(number["REG"], number["STACK"] + number["LOCAL"], fused)


def of_amd(assembly: str) -> Compiled:
    number = {
        name: int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    }
    spills = number["vgpr_spill_count"] + number["sgpr_spill_count"]
    return Compiled(number["vgpr_count"], spills, re.findall(r"\bv_(?:pk_)?(?:fma|fmac|mad|mac)_f\S*", assembly))


# ---- tests ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, int]]:
    return json.loads(REGISTERS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in TARGETS]
)
def test_a_compiled_kernel(target: str, name: str, recorded: dict[str, dict[str, int]], tmp_path: Path) -> None:
    got = compiled(KERNELS[name], TARGETS[target], tmp_path)
    assert got.spills == KERNELS[name].stack.get(target, 0)
    assert not (KERNELS[name].exact and got.fused), got.fused
    assert got.registers == recorded[name][target], (
        "if this is meant, run: python tests/kernels/test_triton_compiled.py"
    )


@triton.jit
def greedy_kernel(x, SIZE: tl.constexpr):
    at = x + tl.arange(0, SIZE)
    values = tl.load(at)
    tl.store(at, tl.fma(values, tl.max(values), values))


@pytest.mark.parametrize(("target", "too_many"), [("sm_90", 1 << 13), ("gfx942", 1 << 15)])
def test_what_is_looked_for_is_found(target: str, too_many: int, tmp_path: Path) -> None:
    """A fused multiply-add, and more values at once than there are registers."""
    few, many = (
        compiled(Kernel(greedy_kernel, {"x": "*fp32:16"}, {"SIZE": size}, True, num_warps=1), TARGETS[target], tmp_path)
        for size in (128, too_many)
    )
    assert few.fused and few.spills == 0 < many.spills


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        table = {
            name: {target: compiled(kernel, gpu, Path(folder)).registers for target, gpu in TARGETS.items()}
            for name, kernel in KERNELS.items()
        }
    lines = (f"{json.dumps(name)}: {json.dumps(registers)}" for name, registers in table.items())
    REGISTERS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
