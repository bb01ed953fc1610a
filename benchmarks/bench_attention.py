"""Times packed attention, forward and backward, against PyTorch's scaled_dot_product_attention.

    python benchmarks/bench_attention.py [--json results.json] [--threads 2] [--rounds 15] [--clock wall] [--only 1024]

Both take turns in one process; `ratio` is the median over the rounds of PyTorch's time over ours, forward and backward
together. Errors are compared first (bf16: ours at most 1.1 times PyTorch's against fp64; fp32: 1e-5), and a wrong
result stops the run. GFLOP/s count the causal half only: 2 products forward, 5 backward, each
heads * tokens^2 * head_dim. `floor` is their time at the rate of a 2048^3 matrix product of that dtype in the same run.

On a busy machine use --threads 1 --clock cpu: the processor time of the process, whoever else runs.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.kernels import registry
from nybble.kernels.backends.cpp import library
from nybble.kernels.ops.attention import attention_backward, attention_forward

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Shape(NamedTuple):
    documents: int
    tokens: int  # of each document
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.documents}x{self.tokens} {self.heads}/{self.kv_heads}x{self.head_dim} {str(self.dtype)[6:]}"

    def flops(self) -> float:
        """Of one product of the causal half."""
        return float(self.documents * self.heads * self.tokens**2 * self.head_dim)


BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = [
    Shape(4, 256, 9, 3, 64, BF16),
    Shape(8, 215, 9, 3, 64, BF16),
    Shape(1, 1024, 32, 8, 64, BF16),
    Shape(1, 1024, 32, 8, 128, BF16),
    Shape(1, 512, 9, 3, 64, BF16),
    Shape(1, 1024, 9, 3, 64, BF16),
    Shape(1, 2048, 9, 3, 64, BF16),
    Shape(1, 4096, 9, 3, 64, BF16),
    Shape(4, 256, 9, 3, 64, FP32),
    Shape(1, 1024, 32, 8, 64, FP32),
    Shape(1, 1024, 32, 8, 128, FP32),
]


class Contender(NamedTuple):
    """`forward` returns out; `backward` returns dq, dk, dv of the latest forward. All [tokens, heads, head_dim]."""

    forward: Callable[[], Tensor]
    backward: Callable[[], tuple[Tensor, ...]]


def ours(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, shape: Shape) -> Contender:
    cu_seqlens = torch.arange(shape.documents + 1, dtype=torch.int32) * shape.tokens
    grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    saved: list[Tensor] = []

    def forward() -> Tensor:
        saved[:] = attention_forward(q, k, v, cu_seqlens, shape.tokens)
        return saved[0]

    def backward() -> tuple[Tensor, ...]:
        return attention_backward(dout, q, k, v, saved[0], saved[1], cu_seqlens, shape.tokens, grads=grads)

    return Contender(forward, backward)


def pytorch(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, shape: Shape) -> Contender:
    def batched(x: Tensor) -> Tensor:
        return x.unflatten(0, (shape.documents, shape.tokens)).transpose(1, 2).contiguous()

    def packed(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    leaves = queries, keys, values = tuple(batched(x).requires_grad_() for x in (q, k, v))
    grad = batched(dout)
    saved: list[Tensor] = []

    def forward() -> Tensor:
        saved[:] = [F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)]
        return packed(saved[0].detach())

    def backward() -> tuple[Tensor, ...]:
        return tuple(packed(x) for x in torch.autograd.grad(saved[0], leaves, grad))

    return Contender(forward, backward)


def check(contenders: dict[str, Contender], exact: Contender, dtype: torch.dtype) -> None:
    """Stops the run when ours is less exact than it should be."""
    results = {name: (c.forward(), *c.backward()) for name, c in (contenders | {"exact": exact}).items()}
    for i, name in enumerate(("out", "dq", "dk", "dv")):
        truth = results["exact"][i]
        error, peer = ((results[c][i].double() - truth).norm() / truth.norm() for c in ("ours", "pytorch"))
        if error > (1.1 * peer if dtype == BF16 else 1e-5):
            raise SystemExit(f"{name} is wrong: relative error {error:.2e}, PyTorch's {peer:.2e}")


def matmul_rate(dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """FLOP/s of a 2048^3 product, the best of 5."""
    a, b = torch.randn(2, 2048, 2048).to(dtype).unbind()
    seconds = []
    for _ in range(5):
        start = clock()
        a @ b.T
        seconds.append(clock() - start)
    return 2 * 2048**3 / min(seconds)


def measure(shape: Shape, rounds: int, clock: Callable[[], float], rate: float) -> dict[str, Any]:
    torch.manual_seed(0)
    rows, widths = shape.documents * shape.tokens, [n * shape.head_dim for n in (shape.heads, *[shape.kv_heads] * 2)]
    fused = torch.randn(rows, sum(widths)).to(shape.dtype)
    q, k, v = (x.unflatten(1, (-1, shape.head_dim)) for x in fused.split(widths, 1))
    inputs = q, k, v, torch.randn(q.shape).to(shape.dtype)
    contenders = {"ours": ours(*inputs, shape), "pytorch": pytorch(*inputs, shape)}
    if shape.tokens <= 1024:  # the fp64 comparison of longer ones would take longer than the measurement
        q, k, v, dout = (x.double() for x in inputs)
        check(contenders, pytorch(q, k, v, dout, shape), shape.dtype)

    seconds: dict[tuple[str, str], list[float]] = {(c, part): [] for c in contenders for part in Contender._fields}
    for _ in range(rounds):
        for name, contender in contenders.items():
            for part, call in contender._asdict().items():
                start = clock()
                call()
                seconds[name, part].append(clock() - start)

    totals = {
        c: [sum(pair) for pair in zip(*(seconds[c, part] for part in Contender._fields), strict=True)]
        for c in contenders
    }
    ratios = [peer / own for own, peer in zip(totals["ours"], totals["pytorch"], strict=True)]
    return {
        "shape": str(shape),
        "rounds": rounds,
        "floor_ms": 7 * shape.flops() / rate * 1e3,
        **{f"{c}_{part}_ms": statistics.median(times) * 1e3 for (c, part), times in seconds.items()},
        **{f"{c}_{part}_min_ms": min(times) * 1e3 for (c, part), times in seconds.items()},
        "gflops": 7 * shape.flops() / statistics.median(totals["ours"]) / 1e9,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2] if rounds > 1 else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--only", default="", help="only shapes whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = CLOCKS[arguments.clock]

    rates = {dtype: matmul_rate(dtype, clock) for dtype in (BF16, FP32)}
    print(f"{library.current_isa()}, {arguments.threads} threads, {arguments.clock} time, torch {torch.__version__}")
    print("matrix products: " + ", ".join(f"{str(d)[6:]} {r / 1e9:.0f} GFLOP/s" for d, r in rates.items()))
    print(f"{'documents x tokens, heads/kv x dim':36} {'forward':>9} {'backward':>9} {'floor':>7} {'GFLOP/s':>8}"
          f" {'PyTorch fwd':>12} {'bwd':>8} {'ratio':>6}  quartiles")  # fmt: skip
    results = []
    for shape in SHAPES:
        if arguments.only not in str(shape):
            continue
        with registry.use("cpp"):
            row = measure(shape, arguments.rounds, clock, rates[shape.dtype])
        results.append(row)
        low, high = row["ratio_quartiles"] or (row["ratio"], row["ratio"])
        print(
            f"{row['shape']:36} {row['ours_forward_ms']:6.2f} ms {row['ours_backward_ms']:6.2f} ms"
            f" {row['floor_ms']:7.2f} {row['gflops']:8.0f}"
            f" {row['pytorch_forward_ms']:9.2f} ms {row['pytorch_backward_ms']:8.2f}"
            f" {row['ratio']:6.2f}  {low:.2f}-{high:.2f}",
            flush=True,
        )
    if arguments.json:
        about = {
            "machine": platform.processor(),
            "torch": torch.__version__,
            "clock": arguments.clock,
            "threads": arguments.threads,
            "kernels": library.describe()["isa"],
        }
        arguments.json.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
