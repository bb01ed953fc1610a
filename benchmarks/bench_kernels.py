"""Times the CPU kernels against plain PyTorch, bitsandbytes (where installed) and the time their bytes need.

    python benchmarks/bench_kernels.py [--json results.json] [--threads 2] [--rounds 15] [--only dequantise]

Contenders of one case take turns in one process, so that other work on the machine meets all of them alike; medians
and quartiles over the rounds are shown. A case's results are compared first, and a wrong one stops the run. `floor` is
the bytes that must move, at the rate at which torch copies a bf16 matrix of 4096 x 11008 in the same run.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.formats.quant_spec import QuantSpec
from nybble.kernels import registry
from nybble.kernels.backends.cpp import library
from nybble.kernels.ops import glu
from nybble.kernels.ops.four_bit import dequantize, dequantize_into, gemv_4bit, quantize
from nybble.kernels.ops.glu import swiglu
from nybble.kernels.ops.loss import cross_entropy_
from nybble.kernels.ops.norm import rms_norm, rms_norm_backward
from nybble.kernels.ops.optimizer import adamw_
from nybble.kernels.ops.rope import rope_


class Case(NamedTuple):
    """One row of the table.

    Args:
        bytes: that must be read and written.
        contenders: by name; the first is nybble's kernel. Each returns its result, for the comparison.
        tolerance: largest difference from the kernel's result, relative to the largest value; 0 for equal bits.
            None where the other computes something else (a copy).
    """

    name: str
    bytes: int
    contenders: dict[str, tuple[Callable[[], Tensor], float | None]]


def reference(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with registry.use("reference"):
            return call()

    return run


def four_bit_cases(rows: int = 4096, columns: int = 11008) -> list[Case]:
    weight, spec = torch.randn(rows, columns).bfloat16(), QuantSpec("nf4", 64, double_quant=True)
    q, out, copy = quantize(weight, spec), torch.empty_like(weight), torch.empty_like(weight)
    wide = torch.empty(rows, columns)

    def dequantise(into: Tensor) -> Callable[[], Tensor]:
        def run() -> Tensor:
            dequantize_into(q, into)
            return into

        return run

    def quantise() -> Tensor:
        return quantize(weight, spec).packed

    to_bf16 = {
        "cpp": (dequantise(out), 0.0),
        "copy": (lambda: copy.copy_(weight), None),
        "reference": (reference(dequantise(torch.empty_like(weight))), 0.0),
    }
    to_four = {"cpp": (quantise, 0.0), "reference": (reference(quantise), 0.0)}
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        print("bitsandbytes is not installed: left out.")
    else:
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        to_bf16["bitsandbytes"] = (lambda: bnb.dequantize_4bit(packed, state), 2**-7)
        to_four["bitsandbytes"] = (
            lambda: bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)[0].view(rows, -1),
            0.0,
        )
    return [
        Case("dequantise to bf16", q.nbytes + 2 * weight.numel(), to_bf16),
        Case("dequantise to fp32", q.nbytes + 4 * weight.numel(), {"cpp": (dequantise(wide), 0.0)}),
        Case("quantise from bf16", q.nbytes + 2 * weight.numel(), to_four),
    ]


def gemv_cases() -> list[Case]:
    cases = []
    for (out_features, in_features), rows, dtype in (
        ((11008, 4096), 1, torch.bfloat16),
        ((11008, 4096), 4, torch.bfloat16),
        ((11008, 4096), 8, torch.bfloat16),
        ((11008, 4096), 1, torch.float32),
        ((1536, 576), 1, torch.bfloat16),
    ):
        q = quantize(torch.randn(out_features, in_features), QuantSpec())
        dense = dequantize(q, dtype)
        x = torch.randn(rows, in_features).to(dtype)
        cases.append(
            Case(
                f"gemv {out_features}x{in_features}, {rows} x {str(dtype)[6:]}",
                q.nbytes,
                {
                    "cpp": (lambda x=x, q=q: gemv_4bit(x, q), 0.0),
                    "dequantise + matmul": (lambda x=x, q=q, t=dtype: x @ dequantize(q, t).T, 2**-6),
                    "dense matmul": (lambda x=x, w=dense: x @ w.T, 2**-6),
                },
            )
        )
    return cases


def block_cases(
    tokens: int = 4096, hidden: int = 2048, width: int = 5632, vocabulary: int = 49152, parameters: int = 10_000_000
) -> list[Case]:
    bf16 = torch.bfloat16
    x, grad, weight = torch.randn(tokens, hidden).to(bf16), torch.randn(tokens, hidden).to(bf16), torch.ones(hidden)
    weight = weight.to(bf16)
    y, rstd = rms_norm(x, weight, 1e-5)
    dx = torch.empty_like(x)
    qkv = torch.randn(tokens, 40, 64).to(bf16)
    cos, sin = torch.randn(tokens, 32), torch.randn(tokens, 32)
    wide_cos, wide_sin = (torch.cat([t, t], -1)[:, None].to(bf16) for t in (cos, sin))
    gate, up, dact = (torch.randn(tokens, width).to(bf16) for _ in range(3))
    act, grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
    logits, targets = torch.randn(512, vocabulary).to(bf16), torch.randint(0, vocabulary, (512,))
    scratch = torch.empty_like(logits)
    state = [torch.randn(parameters).abs() for _ in range(4)]

    def torch_rms() -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(bf16)

    def torch_rope() -> Tensor:
        rotated = torch.cat([-qkv[..., 32:], qkv[..., :32]], -1)
        return qkv * wide_cos + rotated * wide_sin

    def rope() -> Tensor:  # on a copy first, so that the rounds see the same values; the copy counts
        turned = qkv.clone()
        rope_(turned, cos, sin)
        return turned

    def cross_entropy() -> Tensor:
        scratch.copy_(logits)
        return cross_entropy_(scratch, targets, 1.0)

    def torch_cross_entropy() -> Tensor:
        leaf = logits.float().requires_grad_()
        losses = F.cross_entropy(leaf, targets, reduction="none")
        losses.sum().backward()
        return losses.detach()

    def swiglu_backward() -> Tensor:
        glu.swiglu_backward(dact, gate, up, grad_gate, grad_up, act)
        return grad_gate

    def torch_swiglu_backward() -> Tensor:
        s = torch.sigmoid(gate)
        silu = gate * s
        _unused = dact * silu, silu * up
        return dact * up * s * (1 + gate * (1 - s))

    def adamw() -> Tensor:
        adamw_(*state, step=10, lr=0.0)  # lr 0: the rounds see the same parameters
        return state[0]

    param = torch.nn.Parameter(state[0].clone())
    param.grad = state[1].clone()
    optimizer = torch.optim.AdamW([param], lr=0.0, fused=True)

    def torch_adamw() -> Tensor:
        optimizer.step()
        return param.detach()

    n, size = x.numel(), 2
    return [
        Case(
            "rms_norm", 2 * n * size, {"cpp": (lambda: rms_norm(x, weight, 1e-5, out=y)[0], 0.0),
                                       "torch": (torch_rms, 2**-6)},
        ),
        Case(
            "rms_norm backward", 3 * n * size,
            {"cpp": (lambda: rms_norm_backward(grad, x, weight, rstd, out=dx), 0.0)},
        ),
        Case("rope (with a copy)", 4 * qkv.numel() * size, {"cpp": (rope, 0.0), "torch": (torch_rope, 2**-5)}),
        Case(
            "swiglu", 3 * gate.numel() * size,
            {"cpp": (lambda: swiglu(gate, up, out=act), 0.0), "torch": (lambda: F.silu(gate) * up, 2**-6)},
        ),
        Case(
            "swiglu backward", 6 * gate.numel() * size,
            {"cpp": (swiglu_backward, 0.0), "torch": (torch_swiglu_backward, 2**-5)},
        ),
        Case(
            "cross-entropy (with a copy)", 4 * logits.numel() * size,
            {"cpp": (cross_entropy, 0.0), "torch": (torch_cross_entropy, 1e-4)},
        ),
        Case("adamw", 7 * 4 * state[0].numel(), {"cpp": (adamw, 0.0), "torch fused": (torch_adamw, 1e-6)}),
    ]  # fmt: skip


def copy_bytes_per_second(rounds: int) -> float:
    source = torch.randn(4096, 11008).bfloat16()
    target, times = torch.empty_like(source), []
    for _ in range(rounds):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() * 2 / statistics.median(times)


def check(case: Case) -> None:
    (name, (kernel, _)), *others = case.contenders.items()
    got = kernel().clone()
    for other, (call, tolerance) in others:
        if tolerance is None:
            continue
        expected = call()
        error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
        if not error <= tolerance:
            raise SystemExit(f"{case.name}: {name} and {other} differ by {error:.2g}, more than {tolerance:.2g}.")


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in case.contenders}
    for _ in range(rounds):
        for name, (call, _) in case.contenders.items():
            if len(times[name]) >= 3 and statistics.median(times[name]) > 1:  # a slow one need not run so often
                continue
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    about = {
        "kernels": library.describe()["isa"],
        "torch": torch.__version__,
        "threads": arguments.threads,
        "cpu": cpu_name(),
    }
    print(json.dumps(about, indent=2))

    rate = copy_bytes_per_second(arguments.rounds)
    print(f"copy: {rate / 1e9:.1f} GB/s read and written\n")
    print(f"{'case':36}{'contender':>22}{'median ms':>11}{'quartiles':>18}{'to cpp':>9}{'to floor':>10}")
    results = []
    for make in (four_bit_cases, gemv_cases, block_cases):
        for case in make():
            if arguments.only not in case.name:
                continue
            check(case)
            times = measure(case, arguments.rounds)
            kernel = statistics.median(next(iter(times.values())))
            for name, values in times.items():
                median = statistics.median(values)
                low, _, high = statistics.quantiles(values, n=4)
                floor = case.bytes / rate
                print(
                    f"{case.name:36}{name:>22}{1e3 * median:11.2f}{1e3 * low:9.2f}{1e3 * high:9.2f}"
                    f"{median / kernel:8.2f}x{median / floor:9.2f}x"
                )
                results.append(
                    {"case": case.name, "contender": name, "median_s": median, "quartiles_s": [low, high],
                     "to_cpp": median / kernel, "floor_s": floor, "bytes": case.bytes, "rounds": len(values)}
                )  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "copy_bytes_per_s": rate, "results": results}, indent=2) + "\n")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
